"""Rows of a run's pictures; the published triptych is look, result, and the landmarks to follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from matplotlib.figure import Figure
from pydantic import Field

from lmexp.figures.paper import (
    COLUMN_WIDTH,
    Dpi,
    FontSize,
    Sheet,
    Width,
    split_pages,
    text_lines,
    wrap,
)
from lmexp.figures.runs import Sweep

_NAMES = {
    "target_look": "look",
    "target_look_landmarks": "look, landmarks",
    "inversion": "look, inverted",
    "proj": "projection",
    "proj_landmarks": "projection, landmarks",
    "target_expression": "expression",
    "target_expression_landmarks": "landmark image",
}

PictureName = Literal[
    "target_look",
    "target_look_landmarks",
    "inversion",
    "proj",
    "proj_landmarks",
    "target_expression",
    "target_expression_landmarks",
]


class Triptych:
    """One row a run, such as look, projection, landmark image; as many pages as the runs need.

    Args:
        name: stem of the file.
        width: of the figure, in.
        columns: pictures of a run's folder, from left to right.
        rows: most runs on one page.
        font_size: pt.
        dpi: pixels an inch.
    """

    def __init__(
        self,
        name: str = "triptych",
        width: Width = COLUMN_WIDTH,
        columns: tuple[PictureName, ...] = ("target_look", "proj", "target_expression_landmarks"),
        rows: Annotated[int, Field(ge=1)] = 6,
        font_size: FontSize = 8,
        dpi: Dpi = 300,
    ) -> None:
        self.name = name
        self.width = width
        self.columns = columns
        self.rows = rows
        self.font_size = font_size
        self.dpi = dpi

    def why_not(self, sweep: Sweep) -> str:
        """Every run has its pictures, but for one that did not start from an inversion."""
        if "inversion" not in self.columns:
            return ""
        started = [(run.folder.path / "inversion.png").exists() for run in sweep.runs]
        return "" if all(started) else "a run did not start from its look's inversion"

    def draw(self, sweep: Sweep) -> Iterator[tuple[str, Figure]]:
        """Yield the file's stem, with _1, _2, … if one page is not enough, and the page."""
        for stem, page in split_pages(self.name, len(sweep.runs), self.rows):
            yield stem, self._draw_page(sweep, page)

    def _draw_page(self, sweep: Sweep, page: range) -> Figure:
        line = self.font_size / 72 * 1.25
        gap = 0.03
        named = len(sweep.runs) > 1
        count = len(self.columns)
        across = self.width / count - 2 * line
        lines = text_lines(sweep.labels, across, self.font_size)
        margin = lines * line + 0.04 if named else 0.0
        side = (self.width - margin - (count - 1) * gap) / count
        head = line + 0.03
        sheet = Sheet(self.width, head + len(page) * (side + gap) - gap, self.dpi)
        for column, name in enumerate(self.columns):
            middle = margin + column * (side + gap) + side / 2
            sheet.add_text(_NAMES[name], middle, head / 2)
        for row, index in enumerate(page):
            top = head + row * (side + gap)
            if named:
                text = "\n".join(wrap(sweep.labels[index], across, self.font_size))
                sheet.add_text(text, margin / 2 - 0.02, top + side / 2, rotation=90)
            for column, name in enumerate(self.columns):
                picture = sweep.runs[index].folder.read_picture(name)
                sheet.add_picture(picture, margin + column * (side + gap), top, side)
        return sheet.figure
