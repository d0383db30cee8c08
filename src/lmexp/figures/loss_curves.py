"""How every term of the loss went over the steps, as measured and as it counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from pydantic import Field

from lmexp.figures.paper import (
    COLUMN_WIDTH,
    GREY,
    INK,
    PAGE_WIDTH,
    Dpi,
    FontSize,
    Sheet,
    Width,
    balance_columns,
    pick_colours,
)
from lmexp.figures.runs import Sweep


class LossCurves:
    """Raw above, weighted below, on logarithmic axes.

    A single run has one panel with all terms for each of the two; a sweep has one for
    every term and a line for every run.

    Args:
        width: of a sweep's figure, in.
        single_width: of a single run's figure, in.
        height: of one panel, in.
        font_size: pt.
        dpi: pixels an inch.
    """

    def __init__(
        self,
        width: Width = PAGE_WIDTH,
        single_width: Width = COLUMN_WIDTH,
        height: Annotated[float, Field(gt=0.3, le=10)] = 1.15,
        font_size: FontSize = 8,
        dpi: Dpi = 300,
    ) -> None:
        self.width = width
        self.single_width = single_width
        self.height = height
        self.font_size = font_size
        self.dpi = dpi

    def why_not(self, sweep: Sweep) -> str:
        """It needs the metrics of at least one step."""
        return "" if sweep.terms else "no run has metrics"

    def draw(self, sweep: Sweep) -> Iterator[tuple[str, Figure]]:
        """Yield "loss_curves"."""
        figure = self._draw_run(sweep) if len(sweep.runs) == 1 else self._draw_sweep(sweep)
        yield "loss_curves", figure

    def _draw_run(self, sweep: Sweep) -> Figure:
        run = sweep.runs[0]
        line = self.font_size / 72 * 1.3
        left, right, bottom, gap = 0.52, 0.06, 2 * line + 0.08, 0.1
        names = [*run.terms, "total"]
        columns = _legend_columns(names, self.single_width)
        head = -(-len(names) // columns) * line + 0.06
        sheet = Sheet(self.single_width, head + 2 * self.height + gap + bottom, self.dpi)
        colours = dict(zip(run.terms, pick_colours(len(run.terms)), strict=True))
        handles = {}
        for row, kind in enumerate(("raw", "weighted")):
            axes = sheet.add_axes(
                left,
                head + row * (self.height + gap),
                self.single_width - left - right,
                self.height,
            )
            for term in run.terms:
                (handles[term],) = axes.plot(*run.curve(kind, term), color=colours[term])
            if kind == "weighted":
                total = axes.plot(*run.curve("loss", ""), color=INK, linestyle=(0, (4, 1.5)))
                handles["total"] = total[0]
            self._dress(axes, kind, last=row == 1, indent=0.4)
        sheet.figure.legend(
            list(handles.values()),
            [name.replace("_", " ") for name in handles],
            loc="upper center",
            bbox_to_anchor=((left + self.single_width - right) / 2 / self.single_width, 1.0),
            ncols=columns,
            borderpad=0.1,
            handlelength=1.8,
            columnspacing=1.4,
            labelspacing=0.25,
        )
        return sheet.figure

    def _draw_sweep(self, sweep: Sweep) -> Figure:
        line = self.font_size / 72 * 1.3
        left, right, between, gap, head = 0.42, 0.05, 0.44, 0.1, line + 0.03
        panels = len(sweep.terms) + 1
        across = (self.width - left - right - (panels - 1) * between) / panels
        columns = _legend_columns(sweep.labels, self.width)
        legend = -(-len(sweep.runs) // columns) * (self.font_size - 1) / 72 * 1.25 + 0.05
        tall = 2 * self.height + gap
        sheet = Sheet(self.width, head + tall + 2 * line + 0.06 + legend, self.dpi)
        colours = pick_colours(len(sweep.runs))

        total = sheet.add_axes(left, head, across, tall)
        handles = [
            total.plot(*run.curve("loss", ""), color=colour, linewidth=0.9)[0]
            for run, colour in zip(sweep.runs, colours, strict=True)
        ]
        total.set_title("total", pad=3)
        self._dress(total, "", last=True, indent=0.3)
        for column, term in enumerate(sweep.terms, start=1):
            for row, kind in enumerate(("raw", "weighted")):
                axes = sheet.add_axes(
                    left + column * (across + between),
                    head + row * (self.height + gap),
                    across,
                    self.height,
                )
                for run, colour in zip(sweep.runs, colours, strict=True):
                    axes.plot(*run.curve(kind, term), color=colour, linewidth=0.9)
                self._dress(axes, "", last=row == 1, indent=0.3)
                # Not beside the axis, where a tick's number may be as wide as the gap; losses fall,
                # so this corner is free.
                axes.text(
                    *(0.97, 0.95, kind),
                    transform=axes.transAxes,
                    ha="right",
                    va="top",
                    color=GREY,
                    fontsize=self.font_size - 1,
                )
                if row == 0:
                    axes.set_title(term.replace("_", " "), pad=3)
        sheet.figure.legend(
            handles,
            sweep.labels,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=columns,
            borderpad=0.1,
            handlelength=1.6,
            columnspacing=1.4,
            labelspacing=0.25,
        )
        return sheet.figure

    @staticmethod
    def _dress(axes: Axes, label: str, *, last: bool, indent: float) -> None:
        lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
        positive = [value for line in lines for value in line[line > 0]]
        if positive:
            axes.set_yscale("log", nonpositive="mask")
            low, high = np.log10(min(positive)), np.log10(max(positive))
            margin = max(0.06 * (high - low), 0.02)
            axes.set_ylim(10 ** (low - margin), 10 ** (high + margin))
            axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low - margin, high + margin)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.margins(x=0.01)
        axes.set_ylabel(label, va="bottom")
        # At a fixed place, so that the labels of a column of panels line up.
        width = axes.get_window_extent().width / axes.figure.dpi
        axes.yaxis.set_label_coords(-indent / width, 0.5)
        if last:
            axes.set_xlabel("step", labelpad=1)
        else:
            axes.tick_params(labelbottom=False)


def _legend_columns(names: Sequence[str], width: float) -> int:
    """Columns of a legend that fits into `width` inches."""
    entry = 0.4 + 0.068 * max(len(name) for name in names)
    return balance_columns(len(names), max(1, int(width // entry)))


def _log_ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers between 10**low and 10**high, the roundest that are enough."""
    first, last = int(np.floor(low)), int(np.ceil(high))
    ladders: list[tuple[int, tuple[float, ...]]] = [
        *((every, (1.0,)) for every in (8, 4, 2, 1)),
        *((1, steps) for steps in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))),
        (1, tuple(np.arange(1, 10, 0.5))),
        (1, tuple(np.arange(1, 10, 0.1))),
        (1, tuple(np.arange(1, 10, 0.02))),
    ]
    ticks: list[float] = []
    for every, steps in ladders:
        found = [
            step * 10.0**power
            for power in range(first, last + 1)
            if power % every == 0
            for step in steps
            if low <= np.log10(step) + power <= high
        ]
        if len(found) > 5 and len(ticks) >= 2:
            break
        ticks = found
        if len(ticks) >= 3:
            break
    return ticks[:: max(1, -(-len(ticks) // 5))]
