"""How far the projection's landmarks are from the expression's, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from pydantic import Field

from lmexp.figures.paper import (
    GREY,
    INK,
    PAGE_WIDTH,
    Dpi,
    FontSize,
    Sheet,
    Width,
    label_room,
    split_pages,
    wrap,
)
from lmexp.figures.runs import Sweep


class NmeTable:
    """A heat table, runs × landmark groups; the darker the worse, the best of a group bold.

    Args:
        width: of the figure, in.
        label_width: most of the width that the runs' names take, in.
        rows: most runs on one page.
        font_size: pt.
        dpi: pixels an inch.
    """

    def __init__(
        self,
        width: Width = PAGE_WIDTH,
        label_width: Width = 1.6,
        rows: Annotated[int, Field(ge=1)] = 40,
        font_size: FontSize = 8,
        dpi: Dpi = 300,
    ) -> None:
        self.width = width
        self.label_width = label_width
        self.rows = rows
        self.font_size = font_size
        self.dpi = dpi

    def why_not(self, sweep: Sweep) -> str:
        """It needs the error of at least one run."""
        return "" if any(run.nme for run in sweep.runs) else "no run has its NME measured"

    def draw(self, sweep: Sweep) -> Iterator[tuple[str, Figure]]:
        """Yield "nme_table", or "nme_table_1", … if one page is not enough."""
        names = list(dict.fromkeys(name for run in sweep.runs for name in run.nme))
        groups = [name for name in names if name != "all"] + [
            name for name in names if name == "all"
        ]
        values = np.array([[run.nme.get(group, np.nan) for group in groups] for run in sweep.runs])
        for stem, page in split_pages("nme_table", len(sweep.runs), self.rows):
            yield stem, self._draw_page(sweep.labels, groups, values, page)

    def _draw_page(
        self, labels: Sequence[str], groups: Sequence[str], values: NDArray[np.float64], page: range
    ) -> Figure:
        line = self.font_size / 72 * 1.25
        row_height = line + 0.07
        label_width = label_room(labels, self.label_width, self.font_size, self.width * 0.4)
        apart = 0.05  # sets the mean off from the groups
        cell = (self.width - label_width - apart) / len(groups)
        heads = ["\n".join(wrap(group.replace("_", " "), cell, self.font_size)) for group in groups]
        head = line * max(text.count("\n") + 1 for text in heads) + 0.05
        foot = line + 0.03
        sheet = Sheet(self.width, head + len(page) * row_height + foot, self.dpi)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        shade = mpl.colors.Normalize(low, high if high > low else low + 1)
        # Its darker end would swallow the numbers.
        colours = mpl.colors.LinearSegmentedColormap.from_list(
            "nme", mpl.colormaps["YlOrRd"](np.linspace(0.0, 0.6, 256))
        )
        best = np.nanmin(np.where(np.isnan(values), np.inf, values), axis=0)
        for column, text in enumerate(heads):
            left = label_width + column * cell + apart * (groups[column] == "all")
            sheet.add_text(text, left + cell / 2, head - 0.04, anchor="bottom")
            for row, index in enumerate(page):
                value = float(values[index, column])
                top = head + row * row_height
                measured = bool(np.isfinite(value))
                colour = colours(shade(value)) if measured else (0.95, 0.95, 0.95, 1.0)
                sheet.figure.add_artist(
                    Rectangle(
                        (left / sheet.width, 1 - (top + row_height) / sheet.height),
                        cell / sheet.width,
                        row_height / sheet.height,
                        facecolor=colour,
                        edgecolor="white",
                        linewidth=1.0,
                    )
                )
                bold = measured and len(labels) > 1 and value == best[column]
                sheet.add_text(
                    f"{value:.1f}" if measured else "–",
                    left + cell / 2,
                    top + row_height / 2,
                    weight="bold" if bold else "normal",
                    colour=INK,
                )
        for row, index in enumerate(page):
            (text,) = wrap(labels[index], label_width, self.font_size, most=1)
            sheet.add_text(text, 0.0, head + (row + 0.5) * row_height, align="left")
        note = "NME to the expression, % of the distance of the outer eye corners"
        if len(labels) > 1:
            note += "; bold: best of the group"
        place = sheet.height - foot / 2 + 0.01
        sheet.add_text(note, self.width, place, align="right", size=self.font_size - 1, colour=GREY)
        return sheet.figure
