"""How time grows with batch, resolution, steps and GPUs, from the benchmark's results."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmark_tables import milliseconds, read_results
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter

from lmexp.errors import LmexpError
from lmexp.figures.paper import PAGE_WIDTH, Sheet, paper_style, pick_colours, save_figure

HEIGHT = 5.2
ENTRY = 0.13
"""In, of a line of the legend below."""
NOTE_SIZE, NOTE_ABOVE = 5, 2
"""Points: of the words at a line's end, and between both."""
STEPS = 1000
"""Of the published recipe, to which the start's seconds are set in relation."""

STYLES = {256: "--", 512: ":"}
"""Of lines of these sides, px; others are solid."""

Line = dict[float, float]


def draw_plots(paths: Sequence[Path], stem: Path) -> list[Path]:
    """One figure of four plots, as PNG and PDF.

    Raises:
        LmexpError: a file is no result of the benchmark, or none of them measured a step.
    """
    cells = [cell for path in paths for cell in read_results(path)["cells"]]
    cells = [cell for cell in cells if "seconds_per_step" in cell]
    if not cells:
        raise LmexpError("--plot: no step was measured in these files; run the benchmark first")
    stem.parent.mkdir(parents=True, exist_ok=True)
    with paper_style(8):
        names = sorted({label(cell) for cell in cells})
        sheet = Sheet(PAGE_WIDTH, HEIGHT + ENTRY * (len(names) // 2 + 2), 200)
        plots = (
            (draw_batches, "jobs at once", "ms a step and image"),
            (draw_resolutions, "side of the image, px", "ms a step and image"),
            (draw_steps, "steps", "s an image, from the command on"),
            (draw_gpus, "GPUs", "steps · images a second"),
        )
        colours = dict(zip(names, pick_colours(len(names)), strict=True))
        for index, (draw, across, up) in enumerate(plots):
            left = 0.55 + (index % 2) * PAGE_WIDTH / 2
            axes = sheet.add_axes(left, 0.25 + (index // 2) * HEIGHT / 2, 2.85, 1.85)
            axes.set_xlabel(across)
            axes.set_ylabel(up)
            draw(axes, cells, colours)
            if not axes.lines:
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        # One for all four: in the plots it would lie over the lines.
        entries = [Line2D([], [], color=colours[name], label=name) for name in names]
        sides = sorted({cell["resolution"] for cell in cells if cell["devices"] == 1})
        entries += [
            Line2D([], [], color="0.3", linestyle=STYLES.get(side, "-"), label=f"{side} px")
            for side in sides
        ]
        sheet.figure.legend(handles=entries, loc="lower center", ncol=3, fontsize=6)
        return save_figure(sheet.figure, stem)


def label(cell: dict[str, Any]) -> str:
    """Recipe and hardware, and on which device, in the words of the legend."""
    kind = " yardstick" if cell["kind"] == "yardstick" else f" {cell['hardware']}"
    device = cell["device"].removeprefix("NVIDIA ").partition(" 80GB")[0]
    return f"{cell['recipe']}{kind}, {device}"


def collect(
    cells: Iterable[dict[str, Any]],
    name: Callable[[dict[str, Any]], str],
    across: str,
    value: Callable[[dict[str, Any]], float],
) -> dict[str, tuple[dict[str, Any], Line]]:
    """Lines by name, with a cell of each; the best where one place was measured twice."""
    found: dict[str, tuple[dict[str, Any], Line]] = {}
    for cell in cells:
        _, line = found.setdefault(name(cell), (cell, {}))
        here = value(cell)
        line[cell[across]] = min(here, line.get(cell[across], here))
    return found


def median(cell: dict[str, Any]) -> float:
    return statistics.median(milliseconds(cell))


def plot(axes: Axes, line: Line, colour: str, name: str, style: str = "-") -> None:
    places = sorted(line)
    values = [line[place] for place in places]
    axes.plot(places, values, style, marker="o", markersize=3, color=colour, label=name)


def note(axes: Axes, words: Sequence[tuple[Any, str]]) -> None:
    """A few words at each line's end, in its colour, no two over each other, legible on lines.

    To be called when the axes have their scales.
    """
    axes.autoscale_view()
    points = 72 / axes.figure.dpi
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line, _ in words]
    heights = [axes.transData.transform(end)[1] * points for end in ends]
    lowest = -math.inf
    for index in sorted(range(len(words)), key=heights.__getitem__):
        line, text = words[index]
        lowest = max(heights[index] + NOTE_ABOVE, lowest)
        axes.annotate(
            text,
            ends[index],
            xytext=(0, lowest - heights[index]),
            textcoords="offset points",
            ha="right",
            fontsize=NOTE_SIZE,
            color=line.get_color(),
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        lowest += NOTE_SIZE


def use_powers(axes: Axes, places: Iterable[float]) -> None:
    """Both axes logarithmic; ticks where something was measured, in plain numbers."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(set(places)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def draw_batches(axes: Axes, cells: list[dict[str, Any]], colours: dict[str, str]) -> None:
    chosen = [cell for cell in cells if cell["devices"] == 1]
    by_side = collect(chosen, lambda c: f"{label(c)}, {c['resolution']} px", "batch", median)
    places: set[float] = set()
    for name, (cell, line) in by_side.items():
        plot(axes, line, colours[label(cell)], name, STYLES.get(cell["resolution"], "-"))
        places |= set(line)
    use_powers(axes, places)


def draw_resolutions(axes: Axes, cells: list[dict[str, Any]], colours: dict[str, str]) -> None:
    # Of each recipe the largest batch that more than one side was measured with.
    groups: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if cell["devices"] == 1:
            groups[label(cell)][cell["batch"]].append(cell)
    places: set[float] = set()
    words: list[tuple[Any, str]] = []
    for name, by_batch in groups.items():
        several = [
            b for b, chosen in by_batch.items() if len({c["resolution"] for c in chosen}) > 1
        ]
        if several:
            batch = max(several)
            named = f"{name}, batch {batch}"
            lines = collect(by_batch[batch], lambda c, n=named: n, "resolution", median)  # type: ignore[misc]
            plot(axes, lines[named][1], colours[name], named)
            words.append((axes.lines[-1], f"{batch} at once"))
            places |= set(lines[named][1])
    if places:
        use_powers(axes, places)
        note(axes, words)


def rank(cell: dict[str, Any]) -> tuple[bool, int, int]:
    """Which cell of a recipe shows how time grows with steps: one with a second start, or large."""
    return "second_start_seconds" in cell, cell["resolution"], cell["batch"]


def draw_steps(axes: Axes, cells: list[dict[str, Any]], colours: dict[str, str]) -> None:
    # A start and a slope: the projection takes as long at its last step as at its first.
    best: dict[str, dict[str, Any]] = {}
    for cell in cells:
        key = label(cell)
        if "start_seconds" not in cell or cell["devices"] > 1:
            continue
        if key not in best or rank(cell) > rank(best[key]):
            best[key] = cell
    words: list[tuple[Any, str]] = []
    for name, cell in best.items():
        images = cell["batch"] * cell["devices"]
        each = statistics.median(cell["seconds_per_step"])
        first = ", compiled before" if cell.get("compiled_before") else ""
        starts = {first: cell["build_seconds"] + cell["start_seconds"]}
        if "second_start_seconds" in cell:
            starts[", second start"] = cell["second_build_seconds"] + cell["second_start_seconds"]
        for which, begun in starts.items():
            warm = cell["warm_up_steps"]
            places = [warm + (STEPS - warm) * part / 50 for part in range(51)]
            seconds = [(begun + (place - warm) * each) / images for place in places]
            style = STYLES.get(cell["resolution"], "-")
            (drawn,) = axes.plot(places, seconds, style, color=colours[name], label=name + which)
            words.append((drawn, f"{images} at once{which}"))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    note(axes, words)


def draw_gpus(axes: Axes, cells: list[dict[str, Any]], colours: dict[str, str]) -> None:
    several = {(label(c), c["resolution"], c["batch"]) for c in cells if c["devices"] > 1}
    chosen = [c for c in cells if (label(c), c["resolution"], c["batch"]) in several]
    lines = collect(
        chosen,
        lambda c: f"{label(c)}, {c['resolution']} px, batch {c['batch']}",
        "devices",
        lambda c: -1000 / median(c),
    )
    words: list[tuple[Any, str]] = []
    for name, (cell, line) in lines.items():
        rates = {place: -rate for place, rate in line.items()}
        plot(axes, rates, colours[label(cell)], name, STYLES.get(cell["resolution"], "-"))
        words.append((axes.lines[-1], f"{cell['batch']} at once"))
        axes.set_xticks(sorted(rates))
        axes.set_ylim(bottom=0)
    note(axes, words)
