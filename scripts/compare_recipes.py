"""Recipes against each other on pairs of photos, by scores that nothing optimises.

    python scripts/compare_recipes.py --out OUT                       # recipes.yaml on pairs.yaml
    python scripts/compare_recipes.py --out OUT --photos DIR          # your own, paired at random
    python scripts/compare_recipes.py --out OUT --recipes default 'stiff=loss.prior.weight=0.2'
    python scripts/compare_recipes.py --out OUT --common hardware=cuda --no-scores
    python scripts/compare_recipes.py --out OUT --score-only          # later, or elsewhere
    python scripts/compare_recipes.py --out OUT --tables-only --inversion-of RECIPE
    python scripts/compare_recipes.py --out OUT --seconds 300         # as far as that reaches

A recipe is a list of the overrides that `python -m lmexp` takes. Every recipe meets every pair, as
batches, in the order in which recipes are named (those that differ in weights alone share theirs);
what is finished is not run again, so the same command goes on where it was stopped.
OUT gets table.md and table.csv (means, medians, shares of the baselines, failures; 95 % intervals
of shares and of differences from the first recipe), scores.csv (every run), table.json (all of it
with versions, device, commands), sheet.png (a row a pair: look, expression, inversion, then each
recipe) and index.json, which `python -m lmexp.figures OUT` reads.
docs/scores.md defines the numbers. Exits with 1 if a job came to no result, with 2 on bad input.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import logging
import random
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageDraw, ImageFont

from lmexp.composition import conf_folder, explain
from lmexp.config import Experiment, validate
from lmexp.errors import LmexpError
from lmexp.jobs import Outcome, Request
from lmexp.metrics.__main__ import build_scores
from lmexp.metrics.rescoring import Rescorer
from lmexp.metrics.table import COLUMNS, Row, ScoredRun, flatten, tabulate, write_markdown
from lmexp.recording import provenance
from lmexp.recording.atomic_file import write_atomically
from lmexp.recording.images import resize
from lmexp.recording.run_folder import RunFolder
from lmexp.runner import run
from lmexp.stopping import StopRequest, listen

HERE = Path(__file__).parent
QUIET = ("tracker=none", "recording.video_frames=0")
PHOTOS = {".jpg", ".jpeg", ".png", ".webp"}
PICTURES = {"target_look": "look", "target_expression": "expression", "inversion": "inversion"}


@dataclass(frozen=True)
class Pair:
    """Whose face, and whose expression: as `inputs.look` and `inputs.expression`."""

    look: str
    expression: str

    @property
    def name(self) -> str:
        return f"{_short(self.look)} + {_short(self.expression)}"


@dataclass(frozen=True)
class Job:
    """One recipe on one pair, and where it lies; as in index.json."""

    recipe: str
    overrides: tuple[str, ...]
    pair: Pair
    folder: str | None
    state: str
    reason: str

    @property
    def unfinished(self) -> bool:
        """Whether its turn has not come, or it was stopped: no verdict on its recipe."""
        return self.state in ("waiting", "interrupted")


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lmexp").setLevel(logging.INFO)
    try:
        if args.score_only or args.tables_only:
            jobs = read_index(args.out)
        else:
            recipes = choose_recipes(args.recipes, args.recipes_file)
            jobs = run_all(recipes, choose_pairs(args), args.common, args.out, args.seconds)
        if not (args.no_scores or args.tables_only):
            score(jobs, args.out, args.scores, again=args.score_only)
        rows = write_tables(jobs, args.out, args.inversion_of)
    except LmexpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in write_sheets(jobs, args.out, args.side):
        print(path)
    print(write_markdown(rows))
    if unfinished := sum(job.unfinished for job in jobs):
        print(f"{unfinished} of {len(jobs)} jobs are left; the same command goes on with them")
    return 1 if any(job.reason for job in jobs) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the runs and the tables")
    pairs = parser.add_argument_group("pairs").add_mutually_exclusive_group()
    pairs.add_argument(
        "--pairs", type=Path, help="yaml list of [look, expression]; default: scripts/pairs.yaml"
    )
    pairs.add_argument("--photos", type=Path, help="folder of photos, one person each")
    pairs.add_argument("--looks", nargs="+", help="every look with every one of --expressions")
    add("--expressions", nargs="+", help="with --looks")
    add("--count", type=int, help="pairs at most; of --photos so many are drawn (default 24)")
    add("--seed", type=int, default=0, help="of the pairs drawn from --photos")
    add("--recipes", nargs="+", help="names from --recipes-file, or NAME='override override …'")
    add("--recipes-file", type=Path, default=HERE / "recipes.yaml")
    add(
        "--common",
        nargs="+",
        default=[],
        help="overrides of every recipe, after its own: hardware=cuda …",
    )
    add("--no-scores", action="store_true", help="run only; score later with --score-only")
    add(
        "--tables-only", action="store_true", help="tables and sheet again, of the scores there are"
    )
    add("--score-only", action="store_true", help="run nothing: score the runs in --out again")
    add("--seconds", type=float, help="stop after so long, between two steps; keep what is done")
    add(
        "--scores",
        default="independent",
        help="a choice of conf/scores: independent, or faces, which leaves LPIPS out",
    )
    add(
        "--inversion-of",
        metavar="RECIPE",
        help="whose inversions identity is held against (default: the first recipe that has any)",
    )
    add("--side", type=int, default=192, help="side of a picture in the sheet, px")
    args = parser.parse_args(arguments)
    if bool(args.looks) != bool(args.expressions):
        parser.error("--looks and --expressions go together")
    if sum((args.no_scores, args.score_only, args.tables_only)) > 1:
        parser.error("--no-scores, --score-only and --tables-only exclude each other")
    return args


def choose_recipes(chosen: Sequence[str] | None, path: Path) -> dict[str, tuple[str, ...]]:
    """Overrides by recipe: all of the file, or those that were chosen, or given in full.

    Raises:
        LmexpError: an unknown name, or a damaged file.
    """
    known = {
        str(name): tuple(str(override) for override in overrides or ())
        for name, overrides in _read_yaml(path, dict).items()
    }
    recipes = {}
    for word in known if chosen is None else chosen:
        name, given, overrides = word.partition("=")
        if not given and name not in known:
            raise LmexpError(f"--recipes {name}: not in {path}; choices: {', '.join(known)}")
        recipes[name] = tuple(shlex.split(overrides)) if given else known[name]
    return recipes


def choose_pairs(args: argparse.Namespace) -> list[Pair]:
    """The pairs that the command line means.

    Raises:
        LmexpError: a file that is missing or no list of pairs; too few photos.
    """
    if args.looks:
        both = itertools.product(args.looks, args.expressions)
        pairs = [Pair(look, expression) for look, expression in both if look != expression]
    elif args.photos:
        photos = sorted(p for p in args.photos.glob("*") if p.suffix.lower() in PHOTOS)
        if len(photos) < 2:
            raise LmexpError(
                f"{args.photos}: two photos at least are needed, there are {len(photos)}"
            )
        return draw_pairs([str(photo) for photo in photos], args.count or 24, args.seed)
    else:
        path = args.pairs or HERE / "pairs.yaml"
        pairs = []
        for entry in _read_yaml(path, list):
            if not (isinstance(entry, list) and len(entry) == 2):
                raise LmexpError(f"{path}: {entry}: a pair is [look, expression]")
            pairs.append(Pair(str(entry[0]), str(entry[1])))
    return pairs[: args.count]


def draw_pairs(photos: Sequence[str], count: int, seed: int) -> list[Pair]:
    """Pairs of different photos: each is a look, and an expression, once before any is one twice.

    Args:
        count: how many; fewer if there are no more.
    """
    draw = random.Random(seed)
    pairs: list[Pair] = []
    for turn in range(1, len(photos)):
        order = list(photos)
        draw.shuffle(order)
        # A cyclic shift gives no photo itself.
        pairs += [Pair(a, order[(i + turn) % len(order)]) for i, a in enumerate(order)]
        if len(pairs) >= count:
            break
    return list(dict.fromkeys(pairs))[:count]


def run_all(
    recipes: dict[str, tuple[str, ...]],
    pairs: Sequence[Pair],
    common: Sequence[str],
    out: Path,
    seconds: float | None = None,
) -> list[Job]:
    """Run every recipe on every pair that is not done yet, and keep index.json up to date.

    Args:
        seconds: after so long no further step is taken; None: none is missing at the end.

    Raises:
        LmexpError: a recipe does not compose; nothing has been started then.
    """
    # Scored below, from the folders: a run without scores is then as good as one with.
    plan = [
        (name, overrides, pair, config)
        for name, overrides in recipes.items()
        for pair, config in _compose([*QUIET, "scores=none", *overrides, *common], pairs, out)
    ]
    jobs = [
        Job(name, (*overrides, *common), pair, None, "waiting", "its turn has not come")
        for name, overrides, pair, _ in plan
    ]
    out.mkdir(parents=True, exist_ok=True)
    written = 0.0

    def settle(place: int, outcome: Outcome) -> None:
        jobs[place] = replace(
            jobs[place],
            folder=None if outcome.folder is None else f"runs/{outcome.folder.name}",
            state=outcome.state,
            reason="" if outcome.summary else outcome.reason,
        )
        # Of hundreds of jobs, the index takes as long to write as one of them does to finish.
        nonlocal written
        if time.monotonic() - written > 1:
            write_index(out, jobs)
            written = time.monotonic()

    # The recipe's overrides go into the summary, where the figures find the line to copy.
    requests = [Request(config, (name, *overrides)) for name, overrides, _, config in plan]
    try:
        with _limit(seconds) as stop:
            run(requests, out / "runs", out.name, stop=stop, settle=settle)
    finally:
        write_index(out, jobs)
    return jobs


@contextmanager
def _limit(seconds: float | None) -> Iterator[StopRequest]:
    """A request to stop that comes by Ctrl-C, or of itself after some time."""
    with listen() as stop:
        if seconds is None:
            yield stop
            return
        timer = threading.Timer(seconds, stop.ask)
        timer.daemon = True
        timer.start()
        try:
            yield stop
        finally:
            timer.cancel()


def _compose(
    overrides: Sequence[str], pairs: Sequence[Pair], out: Path
) -> list[tuple[Pair, Experiment]]:
    """A recipe's config for each pair; composed once, for Hydra takes half a second."""
    words = [*overrides, f"output_dir='{out / 'runs'}'"]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
            config = validate(compose("config", overrides=words))
    except (HydraException, OmegaConfBaseException) as error:
        raise LmexpError(explain(error)) from error
    return [
        (pair, config.model_copy(update={"inputs": config.inputs.model_copy(update=asdict(pair))}))
        for pair in pairs
    ]


def score(jobs: Sequence[Job], out: Path, choice: str, *, again: bool) -> None:
    """Score the runs in their folders: those without scores, or all of them `again`.

    Pair by pair: what the judges know of a pair's photos then serves all of its runs.
    """
    rescorer = Rescorer(build_scores(choice))
    pairs = list(dict.fromkeys(job.pair for job in jobs))
    done = [job for job in jobs if job.folder and not job.reason]
    done.sort(key=lambda job: pairs.index(job.pair))
    for folder in dict.fromkeys(job.folder for job in done):
        found = RunFolder(out / str(folder))
        if again or not found.read_summary().get("scores"):
            rescorer.rescore(found)


def write_index(out: Path, jobs: Sequence[Job]) -> None:
    """index.json, as a sweep's: figures read it, and --score-only."""
    entries = [
        {
            "folder": job.folder,
            "label": f"{job.recipe}, {job.pair.name}",
            "overrides": {
                "recipe": job.recipe,
                "inputs.look": job.pair.look,
                "inputs.expression": job.pair.expression,
            },
            "recipe_overrides": list(job.overrides),
            "state": job.state,
            "reason": job.reason,
        }
        for job in jobs
    ]
    index = {"name": out.name, "jobs": entries}
    data = (json.dumps(index, indent=2) + "\n").encode()
    write_atomically(out / "index.json", data, durable=False)


def read_index(out: Path) -> list[Job]:
    """The jobs of an earlier call.

    Raises:
        LmexpError: there was none, or its index is damaged.
    """
    path = out / "index.json"
    try:
        entries = json.loads(path.read_bytes())["jobs"]
        return [
            Job(
                recipe=entry["overrides"]["recipe"],
                overrides=tuple(entry["recipe_overrides"]),
                pair=Pair(
                    entry["overrides"]["inputs.look"], entry["overrides"]["inputs.expression"]
                ),
                folder=entry["folder"],
                state=entry["state"],
                reason=entry["reason"],
            )
            for entry in entries
        ]
    except FileNotFoundError:
        raise LmexpError(f"{path}: missing; run this script without --score-only first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LmexpError(f"{path}: damaged ({error}); run the same command again") from error


def write_tables(jobs: Sequence[Job], out: Path, inversion_of: str | None = None) -> list[Row]:
    """table.md, table.csv, scores.csv and table.json; of jobs whose turn has come.

    Raises:
        LmexpError: there is no recipe `inversion_of`.
    """
    if inversion_of is not None and inversion_of not in {job.recipe for job in jobs}:
        raise LmexpError(
            f"--inversion-of {inversion_of}: no such recipe here; choices: "
            f"{', '.join(dict.fromkeys(job.recipe for job in jobs))}"
        )
    jobs = [job for job in jobs if not job.unfinished]
    summaries = {
        job.folder: RunFolder(out / job.folder).read_summary()
        for job in jobs
        if job.folder and not job.reason
    }
    scored = [
        ScoredRun(
            job.recipe,
            job.pair.name,
            summaries[job.folder].get("scores") or {} if job.folder in summaries else {},
            job.reason,
        )
        for job in jobs
    ]
    rows = tabulate(scored, inversion_of)
    (out / "table.md").write_text(write_markdown(rows))
    _write_csv(out / "table.csv", (_plain_row(row) for row in rows))
    _write_csv(
        out / "scores.csv",
        (
            {
                "recipe": run.recipe,
                "pair": run.pair,
                "failure": _failure(run),
                **flatten(run.scores),
            }
            for run in scored
        ),
    )
    recipes = {job.recipe: list(job.overrides) for job in jobs}
    first = next(iter(summaries.values()), {})
    git = provenance.describe_git()
    report = {
        "rows": [asdict(row) for row in rows],
        "recipes": {
            name: {
                "overrides": overrides,
                "command": shlex.join(["python", "-m", "lmexp", *overrides]),
                "seconds_per_job": _mean(
                    summaries[job.folder]["seconds"] / summaries[job.folder]["batch_size"]
                    for job in jobs
                    if job.recipe == name and job.folder in summaries
                ),
            }
            for name, overrides in recipes.items()
        },
        "pairs": [asdict(pair) for pair in dict.fromkeys(job.pair for job in jobs)],
        "failures": [
            {"recipe": run.recipe, "pair": run.pair, "reason": _failure(run)}
            for run in scored
            if _failure(run)
        ],
        "judges": next((run.scores["judges"] for run in scored if "judges" in run.scores), {}),
        "command": shlex.join(["python", *sys.argv]),
        "device": first.get("device"),
        "versions": first.get("versions"),
        "git": first.get("git"),
        "scored_with": {
            "versions": provenance.describe_versions(),
            "git": git.as_dict() if git else None,
        },
    }
    (out / "table.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return rows


def _failure(run: ScoredRun) -> str:
    return run.reason or str(run.scores.get("failure", ""))


def _plain_row(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "recipe": row.name,
        "baseline": row.baseline,
        "pairs": row.pairs,
        "asked": row.asked,
        "failures": row.failures,
        "identity_kept": row.identity_kept,
    }
    for column in COLUMNS:
        plain[f"{column.key} mean"] = row.means.get(column.key)
        plain[f"{column.key} median"] = row.medians.get(column.key)
        if column.of_look:
            plain[f"{column.key} share of look"] = row.shares.get(column.key)
        for name, value in zip(("low", "high"), row.intervals.get(column.key, ()), strict=False):
            plain[f"{column.key} share {name}"] = value
    return plain


def _write_csv(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    lines = list(lines)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def write_sheets(jobs: Sequence[Job], out: Path, side: int, rows: int = 12) -> list[Path]:
    """sheet.png, or sheet_1.png, … of more than `rows` pairs: each picture under its recipe."""
    # A recipe whose turn never came has no column.
    recipes = list(dict.fromkeys(job.recipe for job in jobs if not job.unfinished))
    pairs = list(dict.fromkeys(job.pair for job in jobs))
    found = {(job.pair, job.recipe): job for job in jobs}
    heads = [*PICTURES.values(), *recipes]
    pages = [pairs[first : first + rows] for first in range(0, len(pairs), rows)]
    written = []
    for number, page in enumerate(pages, start=1):
        line = max(14, side // 12)
        sheet = Image.new(
            "RGB", (len(heads) * (side + 4), line + len(page) * (side + line)), "white"
        )
        canvas = ImageDraw.Draw(sheet)
        font = ImageFont.load_default(size=line * 0.7)
        for column, head in enumerate(heads):
            canvas.text(
                (column * (side + 4) + side / 2, line / 2), head, "black", font, anchor="mm"
            )
        for row, pair in enumerate(page):
            top = line + row * (side + line)
            canvas.text((2, top + side + line / 2), pair.name, "grey", font, anchor="lm")
            own = [found[pair, recipe] for recipe in recipes]
            done = [job for job in own if job.folder and not job.reason]
            for column, name in enumerate(PICTURES):
                for job in done:
                    if (out / str(job.folder) / f"{name}.png").exists():
                        _paste(sheet, out, job, name, column * (side + 4), top, side)
                        break
            for column, job in enumerate(own, start=len(PICTURES)):
                if job in done:
                    _paste(sheet, out, job, "proj", column * (side + 4), top, side)
        path = out / ("sheet.png" if len(pages) == 1 else f"sheet_{number}.png")
        sheet.save(path)
        written.append(path)
    return written


def _paste(
    sheet: Image.Image, out: Path, job: Job, name: str, left: int, top: int, side: int
) -> None:
    picture = resize(RunFolder(out / str(job.folder)).read_picture(name), side)
    sheet.paste(Image.fromarray(picture), (left, top))


def _read_yaml(path: Path, kind: type) -> Any:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML's own kinds, OmegaConf's and the file system's
        raise LmexpError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, kind):
        what = "a list" if kind is list else "names with overrides"
        raise LmexpError(f"{path}: {what} is expected at its top")
    return content


def _short(source: str) -> str:
    return source if ":" in source else Path(source).stem


if __name__ == "__main__":
    sys.exit(main())
