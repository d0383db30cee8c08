"""How fast the projection is on this machine, against a plain one and against the machine's limit.

    python scripts/benchmark.py --random-weights --suite quick --out results.json
    python scripts/benchmark.py --recipes default --hardware cpu --resolutions 256 --batches 1
    python scripts/benchmark.py --show docs/benchmarks/h200.json
    python scripts/benchmark.py --plot docs/benchmarks/*.json --out docs/pictures/speed

Each measurement runs in a process of its own. A time per step is that of windows of steps of
`lmexp.projection.project`, Adam and the checks for NaN included, records left out; the clock is
read only at the windows' ends. `start` is from the first line of Python to the end of the last
warm-up step: networks, targets, compilation, capture. Compiled code goes to a folder of this run's
own, empty at first, so that a first start is a cold one; `again` is the same start once more.

The yardstick is `benchmark_yardstick.py`: the same losses, eager float32, one image at a time.
The limit of a part is that of `benchmark_limits.py`, from rates measured in the same run.

`--random-weights` puts random tensors of the same shapes in the place of third parties' files,
so that nothing is fetched; times are the same, pictures are none. Results are written after
each measurement, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from benchmark_cells import RECIPES, Cell, Settings, measure, wait_for_others
from benchmark_tables import milliseconds, print_tables, read_results

from lmexp.errors import LmexpError
from lmexp.recording.provenance import describe_git

CUDA = ("cuda", "cuda_half", "cuda_fast")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything that was asked for was measured, 1 if not, 2 if nothing fits the options."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(given)
    if args.cell is not None:
        return measure_for_parent(args)
    for path in args.show:
        print_tables(read_results(path))
    if args.show:
        return 0
    if args.plot:
        from benchmark_plots import draw_plots

        for path in draw_plots(args.plot, args.out or Path("speed")):
            print(path)
        return 0
    settings = Settings(
        random_weights=args.random_weights,
        windows=args.windows,
        window=args.window,
        warm_up=args.warm_up,
        agreement_steps=args.agreement_steps,
        overrides=tuple(args.set),
        pictures=None if args.out is None else str(args.out.parent),
    )
    # Results are published: where this machine keeps them is nobody's business.
    given = [Path(word).name if word == str(args.out) else word for word in given]
    results: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/benchmark.py", *given]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "revision": describe_revision(),
        "settings": dataclasses.asdict(settings),
        "cells": [],
    }
    del results["settings"]["pictures"]  # a path of this machine's
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        cells = choose_cells(args)
        if not cells:
            print(
                "nothing is left to measure: no measurement of this suite or these choices fits "
                "all of the options; agreement needs hardware in half precision",
                file=sys.stderr,
            )
            return 2
        compiled = args.keep_cache
        for cell in cells:
            # What is measured cold comes first in the suites.
            if args.prepare and not cell.second_start and compiles(cell):
                prepare(
                    [c for c in cells[cells.index(cell) :] if compiles(c)], args, settings, scratch
                )
                args.prepare, compiled = 0, True
            spent = time.monotonic() - began
            if results["cells"] and args.budget is not None and spent > args.budget:
                report = dataclasses.asdict(cell) | {"failed": "no time was left for it"}
            else:
                report = run(cell, args, settings, scratch)
            report["name"] = cell.name
            report["compiled_before"] = compiled and compiles(cell)
            results["cells"].append(report)
            say(cell, report)
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    print_tables(results)
    return int(any("failed" in cell for cell in results["cells"]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--suite", choices=("quick", "full"), help="what is measured; narrowed by the next four"
    )
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES))
    parser.add_argument("--hardware", nargs="+", help="choices of conf/hardware")
    parser.add_argument("--resolutions", nargs="+", type=int)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1], help="at once, a process each")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides")
    parser.add_argument("--windows", type=int, default=5, help="that are timed")
    parser.add_argument("--window", type=int, default=10, help="steps of a window")
    parser.add_argument("--warm-up", type=int, default=6, help="steps before")
    parser.add_argument("--agreement-steps", type=int, default=100)
    parser.add_argument("--no-agreement", action="store_true")
    parser.add_argument("--no-steps", action="store_true", help="agreement alone")
    parser.add_argument("--no-yardstick", action="store_true")
    parser.add_argument("--no-parts", action="store_true")
    parser.add_argument("--budget", type=float, help="s; what would begin later is left out")
    parser.add_argument("--timeout", type=float, default=600.0, help="s, of one measurement")
    parser.add_argument(
        "--prepare",
        type=int,
        default=0,
        metavar="N",
        help="compile for N measurements at once, after those whose cold start is wanted",
    )
    parser.add_argument("--keep-cache", action="store_true", help="use the user's compiled code")
    parser.add_argument("--in-process", action="store_true", help="to look into a measurement")
    parser.add_argument("--out", type=Path, help="JSON; with --plot, the figures' stem")
    parser.add_argument("--show", nargs="+", type=Path, default=[], metavar="JSON", help="as text")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="JSON", help="draw results instead")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def choose_cells(args: argparse.Namespace) -> list[Cell]:
    """What to measure, the important first, in case time runs out.

    A suite is a list; `--recipes`, `--hardware`, `--resolutions`, `--batches` keep those of it
    that match or, without a suite, span one.
    """
    cuda = torch.cuda.is_available()
    if args.suite is None:
        cells = list(span(args, cuda))
    else:
        cells = quick(cuda) if args.suite == "quick" else full(cuda)
        cells = [cell for cell in cells if matches(cell, args)]
    if args.no_agreement:
        cells = [cell for cell in cells if cell.kind != "agreement"]
    if args.no_steps:
        cells = [cell for cell in cells if cell.kind == "agreement"]
    if args.no_yardstick:
        cells = [cell for cell in cells if cell.kind != "yardstick"]
    if args.no_parts:
        cells = [dataclasses.replace(cell, parts=False) for cell in cells]
    return cells


def span(args: argparse.Namespace, cuda: bool) -> Iterator[Cell]:
    """All combinations of what was named, and their yardsticks."""
    hardware = args.hardware or (["cuda_fast"] if cuda else ["cpu"])
    lowered = bool({"hardware.precision=bfloat16", "hardware.precision=float16"} & set(args.set))
    for recipe in args.recipes or ["reference"]:
        for resolution in args.resolutions or [256]:
            yield Cell("yardstick", recipe, resolution, "cpu" if hardware == ["cpu"] else "cuda")
            for name in hardware:
                for batch in args.batches or [1]:
                    for gpus in args.gpus:
                        parts = gpus == 1
                        yield Cell("step", recipe, resolution, name, batch, gpus, parts)
                if name in ("cuda_half", "cuda_fast") or lowered:
                    batch = max(2, min(args.batches or [1]))
                    yield Cell("agreement", recipe, resolution, name, batch)


def matches(cell: Cell, args: argparse.Namespace) -> bool:
    """Whether the user has not left it out."""
    wanted = (args.recipes, args.hardware, args.resolutions, args.batches)
    found = (cell.recipe, cell.hardware, cell.resolution, cell.batch)
    spared = (False, cell.kind == "yardstick", False, cell.kind != "step")
    return all(
        ok or not choices or value in choices
        for choices, value, ok in zip(wanted, found, spared, strict=True)
    )


def quick(cuda: bool) -> list[Cell]:
    """A few minutes: what the headlines are made of."""
    if not cuda:
        return [
            Cell("yardstick", "reference", 256, "cpu"),
            Cell("step", "reference", 256, "cpu", parts=True),
            Cell("yardstick", "default", 256, "cpu"),
            Cell("step", "default", 256, "cpu", parts=True),
        ]
    return [
        Cell("yardstick", "reference", 1024, "cuda"),
        Cell("step", "reference", 1024, "cuda_fast", 16, parts=True, second_start=True),
        Cell("step", "reference", 1024, "cuda_fast", 1, parts=True),
        Cell("yardstick", "reference", 256, "cuda"),
        Cell("step", "reference", 256, "cuda_fast", 64, parts=True),
        Cell("agreement", "reference", 1024, "cuda_fast", 2),
        Cell("yardstick", "mobile", 1024, "cuda"),
        Cell("step", "mobile", 1024, "cuda_fast", 8, parts=True),
        Cell("step", "reference", 1024, "cuda", 8),
        Cell("step", "default", 256, "cuda_half", 48, second_start=True),
        Cell("step", "default", 256, "cuda_fast", 48, parts=True, second_start=True),
    ]


def full(cuda: bool) -> list[Cell]:
    """`quick`, then how time grows with batch and resolution."""
    cells = quick(cuda)
    if not cuda:
        for recipe in ("reference", "default"):
            cells += [Cell("yardstick", recipe, 1024, "cpu"), Cell("step", recipe, 1024, "cpu")]
        return [*cells, *(Cell("step", "default", 256, "cpu", batch) for batch in (2, 4))]
    for batch in (2, 4, 8, 32):
        cells.append(Cell("step", "reference", 1024, "cuda_fast", batch))
    cells.append(Cell("step", "reference", 256, "cuda_fast", 1))
    cells.append(Cell("step", "reference", 512, "cuda_fast", 16))
    for batch in (1, 16, 64):
        cells.append(Cell("step", "mobile", 1024, "cuda_fast", batch))
    for recipe in ("mobile", "default"):
        cells.append(Cell("agreement", recipe, 1024, "cuda_fast", 4))
    cells += [
        Cell("yardstick", "default", 256, "cuda"),
        Cell("yardstick", "default", 1024, "cuda"),
        Cell("step", "default", 1024, "cuda_fast", 16, parts=True),
        Cell("step", "reference", 1024, "cuda", 1),
        Cell("step", "mobile", 1024, "cuda", 8),
        Cell("step", "default", 256, "cuda", 48, second_start=True),
    ]
    return cells


def run(cell: Cell, args: argparse.Namespace, settings: Settings, scratch: Path) -> dict[str, Any]:
    """Measure in processes of their own, one a GPU; a failure is a line in the report."""
    if cell.hardware in CUDA and torch.cuda.device_count() < cell.devices:
        there = torch.cuda.device_count()
        return dataclasses.asdict(cell) | {"failed": f"{cell.devices} GPUs needed, {there} here"}
    if args.in_process:
        return measure(cell, settings, time.time())
    reports = start(cell, args, settings, scratch)
    if cell.second_start and "failed" not in reports[0]:
        once = dataclasses.replace(cell, parts=False, second_start=False)
        again = start(once, args, dataclasses.replace(settings, windows=1), scratch)[0]
        for key in ("build_seconds", "start_seconds"):
            if key in again:
                reports[0][f"second_{key}"] = again[key]
    if len(reports) == 1:
        return reports[0]
    failed = [report for report in reports if "failed" in report]
    if failed:
        return failed[0]
    # The GPUs' windows run side by side: together they are as far as the slowest.
    windows = zip(*(report["seconds_per_step"] for report in reports), strict=True)
    return reports[0] | {"seconds_per_step": [max(window) for window in windows]}


def start(
    cell: Cell, args: argparse.Namespace, settings: Settings, scratch: Path
) -> list[dict[str, Any]]:
    """Run a cell's processes, one a device, to their ends."""
    processes = []
    for index in range(cell.devices):
        own = scratch / f"device_{index}"
        own.mkdir(exist_ok=True)
        processes.append((cell, environment(index, cell, args, scratch), own))
    return follow(processes, args, settings)


def follow(
    processes: Sequence[tuple[Cell, dict[str, str], Path]],
    args: argparse.Namespace,
    settings: Settings,
) -> list[dict[str, Any]]:
    """Start processes, let them measure once all are ready, and read what they found.

    Args:
        processes: each with its environment and an empty folder.
    """
    with ExitStack() as stack:
        children: list[tuple[subprocess.Popen[str], threading.Timer]] = []
        for cell, variables, own in processes:
            (own / "report.json").unlink(missing_ok=True)
            child = subprocess.Popen(
                command_of(cell, args, settings, own / "report.json"),
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context((own / "stderr").open("w")),
                text=True,
            )
            timer = threading.Timer(args.timeout, child.kill)
            timer.start()
            stack.callback(timer.cancel)
            stack.callback(child.kill)
            children.append((child, timer))
        for child, _ in children:  # each says that it is ready, or ends
            assert child.stdout is not None
            child.stdout.readline()
        for child, _ in children:
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it has ended
                child.stdin.write("go\n")
                child.stdin.flush()
        for child, _ in children:
            child.communicate()
        late = [not timer.is_alive() for _, timer in children]
    return [
        read_report(cell, own, f"not done after {args.timeout:.0f} s" if timed_out else "")
        for (cell, _, own), timed_out in zip(processes, late, strict=True)
    ]


def command_of(cell: Cell, args: argparse.Namespace, settings: Settings, report: Path) -> list[str]:
    """A child's command line."""
    command = [sys.executable, __file__, "--cell", json.dumps(dataclasses.asdict(cell))]
    command += ["--report", str(report), "--began", repr(time.time())]
    return [*command, "--settings", json.dumps(dataclasses.asdict(settings))]


def read_report(cell: Cell, own: Path, late: str) -> dict[str, Any]:
    """What a child has measured, or why it has not."""
    if (own / "report.json").is_file():
        report: dict[str, Any] = json.loads((own / "report.json").read_text())
        return report
    lines = (own / "stderr").read_text().strip().splitlines()
    # torch appends advice to what it raises: the exception's own line says more.
    raised = [line for line in lines if re.match(r"(benchmark|[\w.]+(Error|Exception)): ", line)]
    reason = late or (raised or lines or ["it ended without a word"])[-1]
    print(*lines[-30:], sep="\n", file=sys.stderr)
    return dataclasses.asdict(cell) | {"failed": reason}


def compiles(cell: Cell) -> bool:
    """Whether its start takes minutes if nothing is compiled yet."""
    return cell.hardware == "cuda_fast" and cell.devices == 1


def prepare(
    cells: Sequence[Cell], args: argparse.Namespace, settings: Settings, scratch: Path
) -> None:
    """Compile for several cells at once; what they measure meanwhile is of no use."""
    short = dataclasses.replace(settings, windows=1, window=1, agreement_steps=8, pictures=None)

    def start_one(cell: Cell) -> None:
        own = scratch / f"prepare_{cells.index(cell)}"
        own.mkdir()
        variables = environment(0, cell, args, scratch)
        once = dataclasses.replace(cell, parts=False, second_start=False)
        follow([(once, variables, own)], args, short)

    began = time.monotonic()
    with ThreadPoolExecutor(args.prepare) as pool:
        list(pool.map(start_one, cells))
    print(f"compiled for {len(cells)} measurements in {time.monotonic() - began:.0f} s", flush=True)


def environment(index: int, cell: Cell, args: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """Of a child: its own GPU, and where compiled code is kept."""
    variables = dict(os.environ)
    scripts, package = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1] / "src"
    paths = [str(scripts), str(package), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if not args.keep_cache:
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "compiled")
        variables["TRITON_CACHE_DIR"] = str(scratch / "triton")
    if cell.devices > 1:
        visible = variables.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(cell.devices)]
        variables["CUDA_VISIBLE_DEVICES"] = names[index]
    return variables


def measure_for_parent(args: argparse.Namespace) -> int:
    """A child's whole life."""
    settings = json.loads(args.settings)
    settings = Settings(**settings | {"overrides": tuple(settings["overrides"])})
    report = measure(Cell(**json.loads(args.cell)), settings, args.began, wait_for_others)
    args.report.write_text(json.dumps(report))
    return 0


def say(cell: Cell, report: dict[str, Any]) -> None:
    """One line, as soon as it is known."""
    if "failed" in report:
        line = f"FAILED: {report['failed']}"
    elif cell.kind == "agreement":
        terms = report["relative_difference"].items()
        line = ", ".join(f"{name} {value['of_means']:.2%}" for name, value in terms)
    else:
        started = report["build_seconds"] + report["start_seconds"]
        each = statistics.median(milliseconds(report))
        line = f"{each:.2f} ms a step and image, started in {started:.0f} s"
    print(f"{cell.name}: {line}", flush=True)


def describe_revision() -> dict[str, Any] | None:
    """The checkout that was measured."""
    git = describe_git()
    return None if git is None else {"revision": git.revision, "dirty": git.dirty}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LmexpError as fault:
        sys.exit(f"benchmark: {fault}")
