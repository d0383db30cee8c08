"""What a run says at its end: in words, what happened and where to look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

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
    table = Table(title=f"{len(outcomes)} jobs", title_justify="left")
    for column in ("job", "state", "mouth NME", "all NME", "where"):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        table.add_row(
            # As they are: rich would take loss=[lpips] for a style.
            Text(" ".join(outcome.request.overrides) or "–"),
            Text(outcome.state + (f": {outcome.reason}" if outcome.reason else "")),
            *_errors(outcome),
            Text(outcome.folder.name if outcome.folder else "–"),
        )
    console.print(table)
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
