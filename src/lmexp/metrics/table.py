"""Recipes compared over pairs: means, medians, shares of the baselines, failures.

How much of it is the luck of the pairs: 95 % intervals by the percentile bootstrap over pairs
(Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13), of ratios of means and
of what a recipe differs by from the first one on the same pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

BASELINES = {
    "look": "look unchanged",
    "inversion": "look inverted",
    "expression": "expression photo itself",
}
"""Pictures that every run scores beside its result, and what their rows are called."""


RESAMPLES, LEVEL = 4000, 0.95
"""Draws of the bootstrap, seeded, and how often an interval is to hold."""


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
    Column("fan.mouth_error", "mouth error, FAN", of_look=True),
    Column("fan.nme_aligned.mouth", "mouth NME, aligned, FAN", "%", 2, of_look=True),
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
        intervals: of `shares` and, as identity_cosine, of `identity_kept`, by a column's key.
        differences: (mean, low, high) of this recipe less the first on the pairs that both have,
            by a column's key; empty for the first and for baselines.
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
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    differences: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)


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
    first: dict[str, dict[str, float]] | None = None
    for recipe in dict.fromkeys(run.recipe for run in runs):
        own = [run for run in runs if run.recipe == recipe]
        results = {run.pair: flatten(run.scores.get("result") or {}) for run in own}
        results = {pair: numbers for pair, numbers in results.items() if numbers}
        failures = sum(bool(run.reason or run.scores.get("failed")) for run in own)
        row = _row(recipe, results, baselines, asked=len(own), failures=failures, baseline=False)
        rows.append(replace(row, differences=_differences(results, first or {})))
        first = results if first is None else first
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
    means, medians, shares, intervals = {}, {}, {}, {}
    for column in COLUMNS:
        values = [pair[column.key] for pair in numbers.values() if column.key in pair]
        if not values:
            continue
        means[column.key] = statistics.fmean(values)
        medians[column.key] = statistics.median(values)
        if column.of_look and (found := _ratio(numbers, baselines["look"], column.key)):
            shares[column.key], intervals[column.key] = found
    kept = _ratio(numbers, baselines["inversion"], "identity_cosine")
    if kept is not None:
        intervals["identity_cosine"] = kept[1]
    return Row(
        name=name,
        baseline=baseline,
        pairs=len(numbers),
        asked=asked,
        failures=failures,
        means=means,
        medians=medians,
        shares=shares,
        identity_kept=None if kept is None else kept[0],
        intervals=intervals,
    )


def _ratio(
    numbers: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, Mapping[str, float]],
    key: str,
) -> tuple[float, tuple[float, float]] | None:
    """Sum over sum, of the pairs that have the number in both, and its interval.

    None without a positive sum.
    """
    both = _on_both(numbers, reference, key)
    above, below = both.sum(0)
    if below <= 0:
        return None
    sums = _resample(both)
    # A draw of nothing but pairs whose reference is not positive says nothing.
    sums = sums[sums[:, 1] > 0]
    return float(above / below), _interval(sums[:, 0] / sums[:, 1])


def _differences(
    numbers: Mapping[str, Mapping[str, float]], first: Mapping[str, Mapping[str, float]]
) -> dict[str, tuple[float, float, float]]:
    """`Row.differences` from the pairs' numbers of a recipe and of the first one."""
    found = {}
    for column in COLUMNS:
        both = _on_both(numbers, first, column.key)
        if len(both):
            differences = both[:, :1] - both[:, 1:]
            means = _resample(differences)[:, 0] / len(both)
            found[column.key] = (float(differences.mean()), *_interval(means))
    return found


def _on_both(
    numbers: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, Mapping[str, float]],
    key: str,
) -> NDArray[np.float64]:
    """[P, 2], a number of the pairs that have it here and there."""
    both = [
        (own[key], reference[pair][key])
        for pair, own in numbers.items()
        if key in own and key in reference.get(pair, {})
    ]
    return np.array(both, np.float64).reshape(-1, 2)


def _resample(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[P, K] -> [RESAMPLES, K], sums over P rows that are drawn with replacement; always alike."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    sums: NDArray[np.float64] = values[drawn].sum(1)
    return sums


def _interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def write_markdown(rows: Sequence[Row]) -> str:
    """Tables for people: means with shares in brackets, medians, and what is luck."""
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
            "Shares with their 95 % intervals (bootstrap over the pairs).",
            "",
            *_intervals(rows),
            "",
            *_comparison(rows),
        ]
    )


def _intervals(rows: Sequence[Row]) -> list[str]:
    columns = [column for column in COLUMNS if any(column.key in row.intervals for row in rows)]
    lines = _head(["recipe", "pairs", *(column.title for column in columns)])
    for row in rows:
        cells = [f"*{row.name}*" if row.baseline else row.name, str(row.pairs)]
        for column in columns:
            share = _share(row, column)
            if share is None or _is_its_own(row, column):
                cells.append("–")
            else:
                low, high = row.intervals[column.key]
                cells.append(f"{share:.0%} ({low:.0%} to {high:.0%})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _comparison(rows: Sequence[Row]) -> list[str]:
    """What each recipe differs by from the first; bold where the interval leaves 0 out."""
    recipes = [row for row in rows if not row.baseline]
    if len(recipes) < 2:
        return []
    columns = [column for column in COLUMNS if any(column.key in r.differences for r in recipes)]
    lines = [
        f"Less `{recipes[0].name}` on the same pairs, 95 % intervals; **bold** where 0 is outside.",
        "",
        *_head(["recipe", *(f"{column.title} {column.unit}".strip() for column in columns)]),
    ]
    for row in recipes[1:]:
        cells = [row.name]
        for column in columns:
            if column.key not in row.differences:
                cells.append("–")
                continue
            mean, low, high = row.differences[column.key]
            cell = (
                f"{mean:+.{column.digits}f} ({low:+.{column.digits}f} to {high:+.{column.digits}f})"
            )
            cells.append(f"**{cell}**" if low > 0 or high < 0 else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _share(row: Row, column: Column) -> float | None:
    """Of the inversion's identity, or of the unchanged look's number; None where it has none."""
    if column.key == "identity_cosine":
        return row.identity_kept
    return row.shares.get(column.key)


def _head(titles: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]


def _markdown(rows: Sequence[Row], *, medians: bool) -> list[str]:
    columns = [column for column in COLUMNS if any(column.key in row.means for row in rows)]
    heads = ["recipe", "pairs", "failed"]
    heads += [f"{column.title} {column.unit}".strip() for column in columns]
    lines = _head(heads)
    for row in rows:
        failed = "–" if row.baseline else f"{row.failures} of {row.asked}"
        cells = [f"*{row.name}*" if row.baseline else row.name, str(row.pairs), failed]
        for column in columns:
            value = (row.medians if medians else row.means).get(column.key)
            cell = "–" if value is None else f"{value:.{column.digits}f}"
            share = _share(row, column)
            if share is not None and not medians and not _is_its_own(row, column):
                cell += f" ({share:.0%})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _is_its_own(row: Row, column: Column) -> bool:
    own = BASELINES["inversion"] if column.key == "identity_cosine" else BASELINES["look"]
    return row.name == own
