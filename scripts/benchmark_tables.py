"""The benchmark's results as text, also as Markdown for docs/benchmarks.md."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from lmexp.errors import LmexpError


def read_results(path: Path) -> dict[str, Any]:
    """What `--out` wrote.

    Raises:
        LmexpError: it is something else.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        if {"cells", "settings", "revision", "date"} <= set(results):
            return results
    except (OSError, ValueError, TypeError) as fault:
        reason = type(fault).__name__
    else:
        reason = "keys are missing"
    raise LmexpError(
        f"{path}: not a result of the benchmark ({reason}); give what --out wrote"
    ) from None


def print_tables(results: dict[str, Any]) -> None:
    """Whole steps, parts, agreement."""
    cells = [cell for cell in results["cells"] if "failed" not in cell]
    devices = sorted({cell["device"] for cell in cells})
    revision = results["revision"]
    print(f"\n{', '.join(devices)}; {results['date']}", end="")
    print("" if revision is None else f"; revision {revision['revision'][:7]}", end="")
    print("; random weights" if results["settings"]["random_weights"] else "")
    for table in (steps(cells), parts(cells), agreement(cells)):
        if len(table) > 1:
            print()
            print("\n".join(markdown(table)))
    for cell in results["cells"]:
        if "failed" in cell:
            print(f"\nnot measured: {cell['name']}: {cell['failed']}")
        elif isinstance(cell.get("parts"), str):
            print(f"\nparts not measured: {cell['name']}: {cell['parts']}")


def milliseconds(cell: dict[str, Any]) -> list[float]:
    """Of each window, per step and image."""
    images = cell["batch"] * cell["devices"]
    return [1000 * seconds / images for seconds in cell["seconds_per_step"]]


def yardstick_of(cell: dict[str, Any], cells: list[dict[str, Any]]) -> float | None:
    """Median ms a step of the plain projector of the same recipe, side and device."""
    for other in cells:
        same = all(other[key] == cell[key] for key in ("recipe", "resolution", "device"))
        if other["kind"] == "yardstick" and same:
            return statistics.median(milliseconds(other))
    return None


def steps(cells: list[dict[str, Any]]) -> list[list[str]]:
    """A row a cell: time, ratio to the yardstick, memory, start."""
    table = [
        [
            "recipe",
            "px",
            "hardware",
            "batch",
            "GPUs",
            "ms a step",
            "ms a step and image (least–most)",
            "× yardstick",
            "peak GiB",
            "start s",
            "again s",
        ]
    ]
    for cell in cells:
        if cell["kind"] == "agreement":
            continue
        spent = milliseconds(cell)
        median = statistics.median(spent)
        plain = yardstick_of(cell, cells)
        peak = cell.get("peak_memory")
        begun = cell.get("start_seconds")  # absent where steps alone were timed
        again = cell.get("second_start_seconds")
        table.append(
            [
                cell["recipe"],
                str(cell["resolution"]),
                cell["hardware"] + (" (yardstick)" if cell["kind"] == "yardstick" else ""),
                str(cell["batch"]),
                str(cell["devices"]),
                f"{median * cell['batch'] * cell['devices']:.2f}",
                f"{median:.2f} ({min(spent):.2f}–{max(spent):.2f})",
                "" if plain is None else f"{plain / median:.1f}",
                "" if peak is None else f"{peak / 2**30:.2f}",
                "" if begun is None else f"{cell['build_seconds'] + begun:.0f}",
                "" if again is None else f"{cell['second_build_seconds'] + again:.0f}",
            ]
        )
    return table


def parts(cells: list[dict[str, Any]]) -> list[list[str]]:
    """A row a part: time, share, limit, how far it is."""
    table = [
        [
            "recipe, px, hardware, batch",
            "part",
            "ms an image",
            "share",
            "GFLOP an image",
            "limit ms: arithmetic",
            "traffic",
            "both",
            "× limit",
        ]
    ]
    for cell in cells:
        if not isinstance(cell.get("parts"), dict):
            continue
        batch = cell["batch"]
        whole = 1000 * statistics.median(cell["seconds_per_step"]) / batch
        name = f"{cell['recipe']}, {cell['resolution']}, {cell['hardware']}, {batch}"
        total = dict.fromkeys(("seconds", "flops", "arithmetic", "traffic", "limit"), 0.0)
        for part, numbers in cell["parts"].items():
            table.append([name, part, *part_cells(numbers, batch, whole)])
            total = {key: total[key] + numbers[key] for key in total}
        rest = whole - 1000 * total["seconds"] / batch
        table.append([name, "rest", f"{rest:.3f}", f"{rest / whole:.0%}", "", "", "", "", ""])
        total["seconds"] = whole * batch / 1000
        table.append([name, "**whole step**", *part_cells(total, batch, whole)])
    return table


def part_cells(numbers: dict[str, float], batch: int, whole: float) -> list[str]:
    spent = 1000 * numbers["seconds"] / batch
    least = {key: 1000 * numbers[key] / batch for key in ("arithmetic", "traffic", "limit")}
    return [
        f"{spent:.3f}",
        f"{spent / whole:.0%}",
        f"{numbers['flops'] / batch / 1e9:.1f}",
        f"{least['arithmetic']:.3f}",
        f"{least['traffic']:.3f}",
        f"{least['limit']:.3f}",
        f"{spent / least['limit']:.1f}" if least["limit"] else "",
    ]


def agreement(cells: list[dict[str, Any]]) -> list[list[str]]:
    """A row a term: how far this hardware's final losses are from float32's."""
    table = [
        [
            "recipe, px, hardware, jobs, steps",
            "term",
            "mean of jobs, off by",
            "a job, off by, mean (largest)",
            "float32 started 1e-6 away: mean of jobs; a job, mean (largest)",
        ]
    ]
    for cell in cells:
        if cell["kind"] != "agreement":
            continue
        start = (cell["recipe"], cell["resolution"], cell["hardware"], cell["batch"], cell["steps"])
        name = ", ".join(map(str, start))
        for term, off in cell["relative_difference"].items():
            hair = cell["relative_difference_of_a_hair"][term]
            table.append(
                [
                    name,
                    term,
                    f"{off['of_means']:.2%}",
                    f"{off['mean']:.2%} ({off['largest']:.2%})",
                    f"{hair['of_means']:.2%}; {hair['mean']:.2%} ({hair['largest']:.2%})",
                ]
            )
    return table


def markdown(table: list[list[str]]) -> list[str]:
    """The first row is the head; columns are as wide as they need to be."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return lines
