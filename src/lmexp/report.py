"""What a run says at its end: in words, what happened and where to look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmexp.errors import LmexpError
from lmexp.jobs import Outcome
from lmexp.recording.run_folder import RunFolder

COMMAND_TO_GO_ON = "run the same command again to go on"


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if every job has its result, 130 if somebody stopped them, 1 if one failed."""
    states = {outcome.state for outcome in outcomes}
    if "interrupted" in states:
        return 130
    return 1 if "failed" in states else 0


def print_outcomes(
    outcomes: Sequence[Outcome], sweep_folder: Path | None = None, command: str = ""
) -> None:
    """Print one job's result in sentences, a sweep's as a table with the command to retry."""
    console = Console(soft_wrap=True, highlight=False)
    if len(outcomes) == 1 and sweep_folder is None:
        console.print(_tell(outcomes[0]), markup=False)
        return
    _print_jobs(console, outcomes)
    counts = {
        state: sum(o.state == state for o in outcomes)
        for state in ("finished", "skipped", "failed", "interrupted")
    }
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(f"{said}. Everything is in {sweep_folder}", markup=False)
    if sweep_folder is not None and _has_files(sweep_folder / "figures"):
        console.print(f"Figures for a paper, PNG and PDF: {sweep_folder / 'figures'}", markup=False)
    if counts["failed"] or counts["interrupted"]:
        console.print(
            f"{COMMAND_TO_GO_ON[0].upper()}{COMMAND_TO_GO_ON[1:]} with what is not finished"
            f"{':' if command else '.'}"
        )
        if command:
            console.print(f"  {command}", markup=False)


def _print_jobs(console: Console, outcomes: Sequence[Outcome]) -> None:
    """A row a job; where the terminal is too narrow for the words, a paragraph a job."""
    heads = ("job", "state", "mouth NME", "all NME", "where")
    rows = [
        (
            " ".join(outcome.request.overrides) or "–",
            outcome.state + (f": {outcome.reason}" if outcome.reason else ""),
            *_errors(outcome),
            outcome.folder.name if outcome.folder else "–",
        )
        for outcome in outcomes
    ]
    title = f"{len(rows)} jobs"
    widths = _share_out(console.width - 3 * len(heads) - 1, heads, rows)
    if widths is None:
        console.print(title)
        for number, (job, state, mouth, everything, where) in enumerate(rows, 1):
            if everything != "–":
                state += f", mouth NME {mouth}, all NME {everything}"
            texts = [text for text in (job, state, where) if text != "–"]
            _print_paragraph(console, f"{number:>{len(str(len(rows)))}}  ", texts)
        return
    table = Table(title=title, title_justify="left")
    for head, width in zip(heads, widths, strict=True):
        table.add_column(head, width=width)
    for row in rows:
        table.add_row(*map(Text, row))  # as they are: rich would take loss=[lpips] for a style
    console.print(table)


def _share_out(room: int, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int] | None:
    """Widths of a table's columns that break no word and no number; None: there is no room."""
    columns = list(zip(heads, *rows, strict=True))
    most = [max(map(cell_len, column)) for column in columns]
    widths = [
        max(
            cell_len(word)
            for cell in column
            for word in ([cell] if cell.endswith(" %") else cell.split(" "))
        )
        for column in columns
    ]
    if sum(widths) > room:
        return None
    # What lacks least gets it first: a long reason is left what the others do not need.
    for k in sorted(range(len(columns)), key=lambda k: most[k] - widths[k]):
        widths[k] = min(most[k], widths[k] + room - sum(widths))
    return widths


def _print_paragraph(console: Console, first: str, texts: Sequence[str]) -> None:
    indents = [first, *[" " * len(first)] * (len(texts) - 1)]
    for indent, text in zip(indents, texts, strict=True):
        lines = wrap(
            text,
            console.width,
            initial_indent=indent,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
        console.print("\n".join(lines), markup=False)


def _errors(outcome: Outcome) -> tuple[str, str]:
    if outcome.summary is None:
        return "–", "–"
    # What was not finite is null in summary.json.
    errors = {name: math.nan if v is None else v for name, v in outcome.summary["nme"].items()}
    mouth = (errors["outer_lip"] * 12 + errors["inner_lip"] * 8) / 20
    return f"{mouth:.2f} %", f"{errors['all']:.2f} %"


def _has_files(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _ignored(outcome: Outcome) -> list[str]:
    """Groups that a run's name does not hold and that were asked for otherwise than it has them."""
    assert outcome.folder is not None
    try:
        made = RunFolder(outcome.folder).read_config()
    except LmexpError:  # what is there is said all the same
        return []
    asked = outcome.request.config.model_dump(mode="json", by_alias=True)
    return [group for group in ("judge", "scores", "recording") if made.get(group) != asked[group]]


def _tell(outcome: Outcome) -> str:
    folder = outcome.folder
    if outcome.state == "failed":
        where = f"\nWhat was saved is in {folder}" if folder and folder.exists() else ""
        return f"Failed: {outcome.reason}{where}"
    if outcome.state == "interrupted":
        stopped = f"{outcome.reason[:1].upper()}{outcome.reason[1:]}"
        return f"{stopped}.\nTo go on, {COMMAND_TO_GO_ON.removesuffix(' to go on')}."
    assert folder is not None and outcome.summary is not None
    mouth, everything = _errors(outcome)
    before = ""
    if outcome.state == "skipped":
        before = (
            "This very run was finished before, so nothing was computed "
            f"(delete {folder} to repeat it).\n"
        )
        if ignored := _ignored(outcome):
            before += f"It was made with other settings of {', '.join(ignored)}.\n"
    pair = outcome.summary["label"].replace("+", " with the expression of ")
    judge = (
        "a network that was not optimised against"
        if outcome.summary["nme_judge_independent"]
        else "the very network that was optimised against; landmarks@judge=… names another"
    )
    lines = [
        f"{before}The face of {pair} is done: its landmarks are {everything} of the eye distance "
        f"from the expression's ({mouth} at the mouth), measured by {judge}.",
        *(
            f"  {name:<12}{folder / file}"
            for name, file in (
                ("picture", "proj.png"),
                ("video", "proj.mp4"),
                ("figures", "figures"),
            )
            if _has_files(folder / file)
        ),
        f"  numbers     {folder / 'summary.json'}, step by step in {folder / 'metrics.jsonl'}",
    ]
    return "\n".join(lines)
