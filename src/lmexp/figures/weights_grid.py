"""What a setting does to one pair: its look, its expression, then every run's projection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from matplotlib.figure import Figure
from pydantic import Field

from lmexp.figures.paper import (
    GREY,
    PAGE_WIDTH,
    Dpi,
    FontSize,
    Sheet,
    Width,
    balance_columns,
    split_pages,
    text_lines,
    wrap,
)
from lmexp.figures.runs import Sweep
from lmexp.recording.run_folder import Picture


class WeightsGrid:
    """Projections of one pair side by side, labelled by what differs.

    Args:
        width: of the figure, in.
        columns: most pictures in a row.
        rows: most rows on one page.
        scores: write each projection's landmark error under its label.
        font_size: pt.
        dpi: pixels an inch.
    """

    def __init__(
        self,
        width: Width = PAGE_WIDTH,
        columns: Annotated[int, Field(ge=2)] = 6,
        rows: Annotated[int, Field(ge=1)] = 6,
        scores: bool = True,
        font_size: FontSize = 8,
        dpi: Dpi = 300,
    ) -> None:
        self.width = width
        self.columns = columns
        self.rows = rows
        self.scores = scores
        self.font_size = font_size
        self.dpi = dpi

    def why_not(self, sweep: Sweep) -> str:
        """It compares several runs of one pair."""
        if len(sweep.runs) < 2:
            return "it needs at least two runs"
        if not sweep.one_pair:
            return "the runs have different photos"
        return ""

    def draw(self, sweep: Sweep) -> Iterator[tuple[str, Figure]]:
        """Yield "weights_grid", or "weights_grid_1", … if one page is not enough."""
        first = sweep.runs[0].folder
        cells = [
            (first.read_picture("target_look"), "look", ""),
            (first.read_picture("target_expression"), "expression", ""),
        ]
        for run, label in zip(sweep.runs, sweep.labels, strict=True):
            score = f"NME {run.nme['all']:.1f} %" if self.scores and "all" in run.nme else ""
            cells.append((run.folder.read_picture("proj"), label, score))
        columns = balance_columns(len(cells), self.columns)
        for stem, page in split_pages("weights_grid", len(cells), columns * self.rows):
            yield stem, self._draw_page(cells[page.start : page.stop], columns)

    def _draw_page(self, cells: Sequence[tuple[Picture, str, str]], columns: int) -> Figure:
        rows = -(-len(cells) // columns)
        gap = 0.04
        line = self.font_size / 72 * 1.22
        side = (self.width - (columns - 1) * gap) / columns
        lines = text_lines([label for _, label, _ in cells], side, self.font_size)
        scored = any(score for _, _, score in cells)
        caption = (lines + scored) * line + 0.03
        pitch = side + caption + 0.07
        sheet = Sheet(self.width, rows * pitch - 0.07, self.dpi)
        for index, (picture, label, score) in enumerate(cells):
            left = (index % columns) * (side + gap)
            top = (index // columns) * pitch
            sheet.add_picture(picture, left, top, side)
            wrapped = wrap(label, side, self.font_size)
            below = top + side + 0.03
            for number, text in enumerate(wrapped):
                sheet.add_text(text, left + side / 2, below + (number + 0.5) * line)
            if score:
                place = below + (len(wrapped) + 0.5) * line
                sheet.add_text(score, left + side / 2, place, size=self.font_size - 1, colour=GREY)
        return sheet.figure
