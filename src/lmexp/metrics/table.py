"""Recipes compared over pairs: means, medians, shares of the baselines, failures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BASELINES = {
    "look": "look unchanged",
    "inversion": "look inverted",
    "expression": "expression photo itself",
}
"""Pictures that every run scores beside its result, and what their rows are called."""


@dataclass(frozen=True)
class Column:
    """One number of docs/scores.md.

    Attributes:
        key: where it stands in a picture's scores, its parts joined by dots.
        title: what people call it.
        unit: behind the title; empty for a pure number.
        digits: decimals that say something.
        of_look: whether its share of the unchanged look's is reported too.
    """

    key: str
    title: str
    unit: str = ""
    digits: int = 3
    of_look: bool = False


COLUMNS = (
    Column("identity_cosine", "identity"),
    Column("identity_distance", "identity distance"),
    Column("leak_cosine", "leak"),
    Column("mouth_error", "mouth error", of_look=True),
    Column("eye_error", "eye error", of_look=True),
    Column("nme_aligned.mouth", "mouth NME, aligned", "%", 2, of_look=True),
    Column("nme_aligned.all", "NME, aligned", "%", 2, of_look=True),
    Column("nme.all", "NME", "%", 2, of_look=True),
    Column("lpips", "LPIPS"),
    Column("lpips_outside", "LPIPS outside"),
    Column("manifold", "manifold", "", 2),
)


@dataclass(frozen=True)
class ScoredRun:
    """What became of one recipe on one pair.

    Attributes:
        recipe: the recipe's name.
        pair: the pair's name.
        scores: as in summary.json; empty if there is no result, or none was measured.
        reason: why there is no result; empty if there is one.
    """

    recipe: str
    pair: str
    scores: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One recipe, or one baseline, over its pairs.

    Attributes:
        name: of the recipe or the baseline.
        baseline: whether it is one.
        pairs: how many pairs its numbers are means of.
        asked: on how many it was tried.
        failures: how many came to no result, or to one that failed (docs/scores.md).
        means, medians: by a column's key; a number that no pair has is missing.
        shares: mean over the unchanged look's mean on the same pairs, by a column's key.
        identity_kept: mean identity over the inversions' mean identity on the same pairs;
            None if there is none.
    """

    name: str
    baseline: bool
    pairs: int
    asked: int
    failures: int
    means: Mapping[str, float]
    medians: Mapping[str, float]
    shares: Mapping[str, float]
    identity_kept: float | None


def flatten(scores: Mapping[str, Any]) -> dict[str, float]:
    """One picture's scores as numbers by dotted keys; what is no number is left out."""
    flat: dict[str, float] = {}
    for key, value in scores.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": number for name, number in flatten(value).items()}
        elif isinstance(value, (bool, int, float)) and math.isfinite(value):
            flat[key] = float(value)
    return flat


def tabulate(runs: Iterable[ScoredRun], inversion_of: str | None = None) -> list[Row]:
    """Rows of baselines, then of recipes in the order in which they first come.

    Baselines are taken once a pair, from the first recipe that has them: a recipe that starts
    at the mean has no inversion of its own, and is held against the others'. Inversions differ
    with the recipe's terms of the look: `inversion_of` names whose are the yardstick. A recipe's
    shares are ratios of means over the pairs that have both, not means of ratios, which pairs
    with hardly any difference would rule.

    Args:
        runs: every recipe on every pair, those without a result too.
        inversion_of: a recipe; None: the first of each pair that has an inversion.
    """
    runs = list(runs)
    baselines: dict[str, dict[str, dict[str, float]]] = {picture: {} for picture in BASELINES}
    for run in runs:
        for picture, found in baselines.items():
            if picture == "inversion" and inversion_of not in (None, run.recipe):
                continue
            numbers = flatten(run.scores.get(picture) or {})
            if numbers:
                found.setdefault(run.pair, numbers)
    rows = [
        _row(BASELINES[picture], found, baselines, asked=len(found), failures=0, baseline=True)
        for picture, found in baselines.items()
        if found
    ]
    for recipe in dict.fromkeys(run.recipe for run in runs):
        own = [run for run in runs if run.recipe == recipe]
        results = {run.pair: flatten(run.scores.get("result") or {}) for run in own}
        failures = sum(bool(run.reason or run.scores.get("failed")) for run in own)
        rows.append(
            _row(
                recipe,
                {pair: numbers for pair, numbers in results.items() if numbers},
                baselines,
                asked=len(own),
                failures=failures,
                baseline=False,
            )
        )
    return rows


def _row(
    name: str,
    numbers: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    asked: int,
    failures: int,
    baseline: bool,
) -> Row:
    means, medians, shares = {}, {}, {}
    for column in COLUMNS:
        values = [pair[column.key] for pair in numbers.values() if column.key in pair]
        if not values:
            continue
        means[column.key] = statistics.fmean(values)
        medians[column.key] = statistics.median(values)
        share = _ratio(numbers, baselines["look"], column.key) if column.of_look else None
        if share is not None:
            shares[column.key] = share
    return Row(
        name=name,
        baseline=baseline,
        pairs=len(numbers),
        asked=asked,
        failures=failures,
        means=means,
        medians=medians,
        shares=shares,
        identity_kept=_ratio(numbers, baselines["inversion"], "identity_cosine"),
    )


def _ratio(
    numbers: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, Mapping[str, float]],
    key: str,
) -> float | None:
    """Sum over sum, of the pairs that have the number in both; None without a positive sum."""
    both = [
        (own[key], reference[pair][key])
        for pair, own in numbers.items()
        if key in own and key in reference.get(pair, {})
    ]
    below = sum(value for _, value in both)
    return sum(value for value, _ in both) / below if below > 0 else None


def write_markdown(rows: Sequence[Row]) -> str:
    """Two tables for people: means with shares in brackets, then medians."""
    return "\n".join(
        [
            "Means over the pairs; in brackets the share of the unchanged look's, and for identity "
            "of the inversion's.",
            "",
            *_markdown(rows, medians=False),
            "",
            "Medians.",
            "",
            *_markdown(rows, medians=True),
            "",
        ]
    )


def _markdown(rows: Sequence[Row], *, medians: bool) -> list[str]:
    columns = [column for column in COLUMNS if any(column.key in row.means for row in rows)]
    heads = ["recipe", "pairs", "failed"]
    heads += [f"{column.title} {column.unit}".strip() for column in columns]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in rows:
        failed = "–" if row.baseline else f"{row.failures} of {row.asked}"
        cells = [f"*{row.name}*" if row.baseline else row.name, str(row.pairs), failed]
        for column in columns:
            value = (row.medians if medians else row.means).get(column.key)
            cell = "–" if value is None else f"{value:.{column.digits}f}"
            share = row.identity_kept if column.key == "identity_cosine" else None
            share = row.shares.get(column.key, share)
            if share is not None and not medians and not _is_its_own(row, column):
                cell += f" ({share:.0%})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _is_its_own(row: Row, column: Column) -> bool:
    own = BASELINES["inversion"] if column.key == "identity_cosine" else BASELINES["look"]
    return row.name == own
