"""What expression costs in identity: every run as a point, the front, and its knee."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from pydantic import Field

from lmexp.figures.paper import COLOURS, GREY, INK, PAGE_WIDTH, Dpi, FontSize, Sheet, Width, wrap
from lmexp.figures.runs import (
    Run,
    Sweep,
    describe_value,
    plain,
    read_sweep,
    shorten_keys,
    show_value,
)
from lmexp.metrics.table import Row, ScoredRun, tabulate
from lmexp.recording.run_folder import Picture

_FARTHEST = 1.25
"""Identity kept beyond which a baseline is only pointed at, unless runs are there too: the photo
itself keeps more than any inversion does, and would squeeze the rest together."""

_OF_THE_PAIR = ("inputs.look", "inputs.expression", "recipe")
"""Overrides that a line to copy leaves out: whose faces they are is the reader's own matter."""


@dataclass(frozen=True)
class Point:
    """One setting, its means over the pairs that it met, or a baseline.

    Attributes:
        label: what it is called.
        kept: identity kept, mean over the inversions' mean; 1 is what plain inversion keeps.
        taken: expression taken, 1 − error over the unchanged look's error; 1 is all of it.
        kind: a point of the sweep, one beside it, or a baseline.
        overrides: the line that makes it.
        picture: its result on the first pair; None for a baseline.
    """

    label: str
    kept: float
    taken: float
    kind: Literal["sweep", "beside", "baseline"]
    overrides: str = ""
    picture: Picture | None = None


class Pareto:
    """A plot of identity kept (right is better) against expression taken (up is better).

    Runs that differ by their photos alone are one point, of means over the pairs.

    Args:
        measure: what the expression is measured by: the mouth's opening, or its shape.
        beside: folders of finished runs or sweeps of the same pairs, drawn in for comparison; they
            do not take part in the front. NAME=FOLDER is labelled NAME, FOLDER by what it is.
        inversion_of: the point (by its label) whose inversions identity is held against; null:
            the first that has any.
        width, height: of the figure, in.
        thumbnail: side of a picture, in.
        font_size: pt.
        dpi: pixels an inch.
    """

    def __init__(
        self,
        measure: Literal["mouth_error", "nme_aligned.mouth"] = "mouth_error",
        beside: tuple[str, ...] = (),
        inversion_of: str | None = None,
        width: Width = PAGE_WIDTH,
        height: Width = 4.6,
        thumbnail: Annotated[float, Field(gt=0.05, le=3)] = 0.5,
        font_size: FontSize = 8,
        dpi: Dpi = 300,
    ) -> None:
        self.measure = measure
        self.beside = beside
        self.inversion_of = inversion_of
        self.width = width
        self.height = height
        self.thumbnail = thumbnail
        self.font_size = font_size
        self.dpi = dpi

    def why_not(self, sweep: Sweep) -> str:
        """It needs three points at least, and the scores of an inversion to hold them against."""
        found = [point for point in self.points(sweep) if point.kind == "sweep"]
        if len(found) < 3:
            return (
                "it needs three runs with scores (identity and landmarks) and with an inversion, "
                f"these are {len(found)}"
            )
        return ""

    def points(self, sweep: Sweep) -> list[Point]:
        """Settings (or recipes, where that is a factor), those beside them, and the baselines."""
        runs = list(zip(_name_settings(sweep), sweep.runs, strict=True))
        others = [
            (name, run)
            for place in self.beside
            for name, run in _read_beside(place, taken={name for name, _ in runs})
        ]
        kinds: dict[str, Literal["sweep", "beside"]] = {
            **dict.fromkeys((name for name, _ in others), "beside"),
            **dict.fromkeys((name for name, _ in runs), "sweep"),
        }
        first: dict[str, Run] = {}
        for name, run in (*runs, *others):
            first.setdefault(name, run)
        rows = tabulate(
            (
                ScoredRun(name, str(run.summary.get("label", run.label)), run.scores)
                for name, run in (*runs, *others)
            ),
            self.inversion_of,
        )
        return [point for row in rows if (point := self._point(row, kinds, first)) is not None]

    def _point(
        self,
        row: Row,
        kinds: dict[str, Literal["sweep", "beside"]],
        first: dict[str, Run],
    ) -> Point | None:
        share = row.shares.get(self.measure)
        if share is None or row.identity_kept is None:
            return None
        if row.baseline:
            return Point(row.name, row.identity_kept, 1 - share, "baseline")
        run = first[row.name]
        picture = run.folder.read_picture("proj")
        return Point(
            row.name, row.identity_kept, 1 - share, kinds[row.name], _write_line(run), picture
        )

    def draw(self, sweep: Sweep) -> Iterator[tuple[str, Figure]]:
        """Yield "pareto"."""
        points = self.points(sweep)
        own = [point for point in points if point.kind == "sweep"]
        best = find_front([(point.kept, point.taken) for point in own])
        front = [own[index] for index in best]
        knee = front[find_knee([(point.kept, point.taken) for point in front])]

        line = self.font_size / 72 * 1.25
        left, bottom = 0.6, 3 * line + 0.32
        sheet = Sheet(self.width, self.height, self.dpi)
        across, tall = self.width - left - 0.1, self.height - 0.1 - bottom
        axes = sheet.add_axes(left, 0.1, across, tall)
        farthest = max(_FARTHEST, *(point.kept for point in points if point.kind != "baseline"))
        self._set_limits(axes, [point for point in points if point.kept <= farthest])
        axes.plot(
            [point.kept for point in front], [point.taken for point in front], color=COLOURS[0]
        )
        named_above: list[Point] = []
        for point in points:
            # Two names of neighbours, one above its point and one below: they would be one smear.
            near = any(
                abs(point.taken - other.taken) < 0.05 and abs(point.kept - other.kept) < 0.3
                for other in named_above
            )
            if point.kind != "sweep" and not near:
                named_above.append(point)
            self._mark(axes, point, knee=point is knee, farthest=farthest, below=near)
        named = "recipe" in sweep.factors  # names of recipes are short; overrides are not
        self._add_pictures(sheet, axes, (left, 0.1, across, tall), points, knee, named=named)
        error = "mouth opening's error" if self.measure == "mouth_error" else "aligned mouth NME"
        axes.set_xlabel("identity kept: cosine to the look, over that of the look inverted")
        axes.set_ylabel(f"expression taken: 1 − {error} / unchanged look's")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        told = f"knee: {knee.overrides}  ({knee.kept:.0%} kept, {knee.taken:.0%} taken)"
        lines = wrap(told, self.width, self.font_size)
        for number, text in enumerate(reversed(lines)):
            y = self.height - 0.04 - (number + 0.5) * line
            sheet.add_text(text, 0.02, y, align="left", colour=COLOURS[1])
        yield "pareto", sheet.figure

    def texts(self, sweep: Sweep) -> Iterator[tuple[str, str]]:
        """Yield "pareto.txt": the knee's overrides, to copy, then every point."""
        points = self.points(sweep)
        own = [point for point in points if point.kind == "sweep"]
        front = [own[i] for i in find_front([(point.kept, point.taken) for point in own])]
        knee = front[find_knee([(point.kept, point.taken) for point in front])]
        lines = [knee.overrides, "", "kept\ttaken\tfront\tpoint"]
        lines += [
            f"{point.kept:.4f}\t{point.taken:.4f}\t{'yes' if point in front else 'no'}\t"
            f"{point.overrides or point.label}"
            for point in points
        ]
        yield "pareto.txt", "\n".join([*lines, ""])

    def _set_limits(self, axes: Axes, points: Sequence[Point]) -> None:
        for values, setter in (
            ([point.kept for point in points], axes.set_xlim),
            ([point.taken for point in points], axes.set_ylim),
        ):
            low, high = min(values), max(values)
            room = 0.1 * (high - low or 1.0)
            setter(low - room, high + room)

    def _mark(self, axes: Axes, point: Point, *, knee: bool, farthest: float, below: bool) -> None:
        if point.kept > farthest:
            axes.annotate(
                f"{point.label} ({point.kept:.0%}) →",
                (axes.get_xlim()[1], point.taken),
                xytext=(0, -3),
                textcoords="offset points",
                ha="right",
                va="top",
                color=GREY,
                fontsize=self.font_size - 1,
                annotation_clip=False,
            )
            return
        marker, colour = {
            "sweep": ("o", COLOURS[0]),
            "beside": ("s", COLOURS[2]),
            "baseline": ("D", GREY),
        }[point.kind]
        axes.plot(point.kept, point.taken, marker, color=colour, markersize=4, zorder=4)
        if knee:
            axes.plot(
                point.kept,
                point.taken,
                "o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=COLOURS[1],
                markeredgewidth=1.4,
                zorder=5,
            )
        if point.kind != "sweep":
            right = point.kept > sum(axes.get_xlim()) / 2
            axes.annotate(
                point.label if point.kind == "baseline" else show_value(point.label),
                (point.kept, point.taken),
                xytext=(-5 if right else 5, -3 if below else 3),
                textcoords="offset points",
                ha="right" if right else "left",
                va="top" if below else "bottom",
                color=colour,
                fontsize=self.font_size - 1,
            )

    def _add_pictures(
        self,
        sheet: Sheet,
        axes: Axes,
        box: tuple[float, float, float, float],
        points: Sequence[Point],
        knee: Point,
        *,
        named: bool,
    ) -> None:
        """Each picture beside its point, where the next free place is, tied to it by a line.

        `named`: with the point's label below.
        """
        line = (self.font_size - 2) / 72 * 1.2 if named else 0.0
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        left, top, across, tall = box
        places = [
            (
                point,
                left + (point.kept - x0) / (x1 - x0) * across,
                top + (y1 - point.taken) / (y1 - y0) * tall,
            )
            for point in points
        ]
        # The knee first: it gets the best place.
        places.sort(key=lambda place: place[0] is not knee)
        marks = [(x, y) for _, x, y in places]
        # Nor may a picture hide what is written beside a point; a letter is half as wide as high.
        letter = (self.font_size - 1) / 72 / 2
        for point, x, y in places:
            if point.kind != "sweep":
                sign = -1 if point.kept > (x0 + x1) / 2 else 1
                marks += [(x + sign * letter * k, y) for k in range(len(point.label) + 2)]
        side, taken = self.thumbnail, list[tuple[float, float]]()
        for point, x, y in places:
            if point.picture is None:
                continue
            centre = _free_place((x, y), side, taken, marks, box, below=line)
            if centre is None:
                continue  # the sheet is full: the point stays, without its picture
            taken.append(centre)
            _tie(sheet, (x, y), centre, side, INK if point is knee else GREY)
            sheet.add_picture(point.picture, centre[0] - side / 2, centre[1] - side / 2, side)
            if named and point.kind == "sweep":
                sheet.add_text(
                    show_value(point.label),
                    centre[0],
                    centre[1] + side / 2 + line / 2,
                    size=self.font_size - 2,
                    colour=INK if point is knee else GREY,
                )


def _name_settings(sweep: Sweep) -> list[str]:
    """Each run's name without its photos': the recipe's, or what differs between the settings."""
    if "recipe" in sweep.factors:
        return [str(run.overrides["recipe"]) for run in sweep.runs]
    keys = [key for key in sweep.factors if key not in _OF_THE_PAIR]
    if not keys:
        return [sweep.name] * len(sweep.runs)
    names = dict(zip(keys, shorten_keys(keys), strict=True))
    return [
        ", ".join(
            describe_value(names[key], plain(run.overrides[key]))
            for key in keys
            if key in run.overrides
        )
        for run in sweep.runs
    ]


def _read_beside(place: str, taken: Collection[str]) -> list[tuple[str, Run]]:
    """The runs of a folder, or of NAME=FOLDER, by their points' names, none of them `taken`."""
    name, given, folder = place.partition("=")
    # A folder's own name may hold such a sign.
    if not given or Path(place).exists():
        name, folder = "", place
    sweep = read_sweep(Path(folder))
    names = _name_settings(sweep)
    if name:
        names = [name] if len(set(names)) == 1 else [f"{name}: {own}" for own in names]
        names = names * (len(sweep.runs) // len(names))
    return [
        (f"{own} (beside)" if own in taken else own, run)
        for own, run in zip(names, sweep.runs, strict=True)
    ]


def _write_line(run: Run) -> str:
    """The overrides that make a point on anybody's photos."""
    recipe = run.overrides.get("recipe")
    if recipe is None:
        return shlex.join(
            f"{key}={value}" for key, value in run.overrides.items() if key not in _OF_THE_PAIR
        )
    # scripts/compare_recipes.py writes the recipe's name, then its overrides.
    _, *words = run.summary.get("overrides") or [recipe]
    return shlex.join(words) if words else f"recipe {recipe}"


def _free_place(
    point: tuple[float, float],
    side: float,
    taken: Sequence[tuple[float, float]],
    marks: Sequence[tuple[float, float]],
    box: tuple[float, float, float, float],
    below: float = 0.0,
) -> tuple[float, float] | None:
    """The nearest centre of a square of `side` that covers neither a square nor a mark, in.

    `below` is room that each square needs under itself.
    """
    left, top, across, tall = box
    for radius in np.arange(0.62, 4.0, 0.12) * side:
        for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False) - math.pi / 4:
            x, y = point[0] + radius * math.cos(angle), point[1] + radius * math.sin(angle)
            inside = left <= x - side / 2 and x + side / 2 <= left + across
            inside = inside and top <= y - side / 2 and y + side / 2 + below <= top + tall
            clear = all(
                abs(x - a) > 1.04 * side or abs(y - b) > 1.04 * side + below for a, b in taken
            )
            clear = clear and all(max(abs(x - a), abs(y - b)) > 0.56 * side for a, b in marks)
            if inside and clear:
                return float(x), float(y)
    return None


def _tie(
    sheet: Sheet,
    point: tuple[float, float],
    centre: tuple[float, float],
    side: float,
    colour: str,
) -> None:
    """A line from a point to the edge of its picture."""
    across, down = centre[0] - point[0], centre[1] - point[1]
    share = 1 - side / 2 / max(abs(across), abs(down))
    x, y = point[0] + share * across, point[1] + share * down
    line = Line2D(
        [point[0] / sheet.width, x / sheet.width],
        [1 - point[1] / sheet.height, 1 - y / sheet.height],
        color=colour,
        linewidth=0.5,
    )
    sheet.figure.add_artist(line)


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates, by falling first one.

    Args:
        points: the larger the better, in both.
    """
    order = sorted(range(len(points)), key=lambda index: points[index], reverse=True)
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def find_knee(front: Sequence[tuple[float, float]]) -> int:
    """Index of the point that lies farthest beyond the chord of the front's ends.

    Both coordinates are first brought to [0, 1] over the front, so that their units do not
    matter. A front of one or two points has no bend: the one with the larger sum, so brought,
    is taken (the first of equals).

    Source: Das, "On characterizing the 'knee' of the Pareto curve based on normal-boundary
    intersection", Structural Optimization 18, 1999; for curves known as Kneedle (Satopää et
    al., ICDCS-W 2011).
    """
    values = np.asarray(front, dtype=float)
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(0)) / np.where(span > 0, span, 1.0)
    # The chord goes from (1, 0) to (0, 1): the distance from it grows with the sum.
    return int(np.argmax(np.round(scaled.sum(1), 12)))
