"""Two settings at once: one along the rows, the other along the columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from lmexp.figures.paper import GREY, PAGE_WIDTH, Dpi, FontSize, Sheet, Width, wrap
from lmexp.figures.runs import Run, Sweep, plain, shorten_keys, show_value
from lmexp.recording.run_folder import Picture

_TARGETS = {"look": "target_look", "expression": "target_expression"}


class FactorGrid:
    """A grid of projections over two factors; photos as factors stand in its margins.

    Args:
        width: most of the figure's width, in; a grid of few columns is narrower.
        side: most of a picture's side, in.
        font_size: pt.
        dpi: pixels an inch.
    """

    def __init__(
        self,
        width: Width = PAGE_WIDTH,
        side: Width = 1.4,
        font_size: FontSize = 8,
        dpi: Dpi = 300,
    ) -> None:
        self.width = width
        self.side = side
        self.font_size = font_size
        self.dpi = dpi

    def why_not(self, sweep: Sweep) -> str:
        """It needs two factors, and one run in each cell at most."""
        if len(sweep.factors) != 2:
            return f"it needs two factors, these runs have {len(sweep.factors)}"
        rows, columns = self._split(sweep)
        places = {_place(run, rows, columns) for run in sweep.runs}
        return "" if len(places) == len(sweep.runs) else "several runs share a cell"

    def draw(self, sweep: Sweep) -> Iterator[tuple[str, Figure]]:
        """Yield "factor_grid"."""
        row_key, column_key = self._split(sweep)
        row_values, column_values = sweep.factors[row_key], sweep.factors[column_key]
        names = dict(zip(sweep.factors, shorten_keys(list(sweep.factors)), strict=True))
        runs = {_place(run, row_key, column_key): run for run in sweep.runs}

        gap = 0.04
        line = self.font_size / 72 * 1.25
        row_photos, column_photos = _target(row_key), _target(column_key)
        # A margin holds the factor's name and, beside it, its values: words or photos.
        columns = len(column_values) + bool(row_photos)
        words = line if row_photos else 2 * line
        side = min(self.side, (self.width - words - 0.04 - columns * gap) / columns)
        left = line + 0.02 + (side + 2 * gap if row_photos else line + 0.02)
        top = line + 0.02 + (side + 2 * gap if column_photos else line)
        pitch = side + gap
        across, down = len(column_values) * pitch - gap, len(row_values) * pitch - gap
        sheet = Sheet(left + across, top + down, self.dpi)

        sheet.add_text(names[column_key], left + across / 2, line / 2)
        sheet.add_text(names[row_key], line / 2, top + down / 2, rotation=90)
        for column, value in enumerate(column_values):
            x = left + column * pitch
            if column_photos:
                photo = _photo(sweep, column_key, value, column_photos)
                sheet.add_picture(photo, x, line + 0.02, side)
            else:
                (text,) = wrap(show_value(value), side, self.font_size, most=1)
                sheet.add_text(text, x + side / 2, 1.5 * line)
        for row, value in enumerate(row_values):
            y = top + row * pitch
            if row_photos:
                photo = _photo(sweep, row_key, value, row_photos)
                sheet.add_picture(photo, line + 0.02, y, side)
            else:
                (text,) = wrap(show_value(value), side, self.font_size, most=1)
                sheet.add_text(text, 1.5 * line + 0.01, y + side / 2, rotation=90)
            for column, other in enumerate(column_values):
                x = left + column * pitch
                run = runs.get((value, other))
                if run is None:
                    sheet.add_text("not run", x + side / 2, y + side / 2, colour=GREY)
                else:
                    sheet.add_picture(run.folder.read_picture("proj"), x, y, side)
        yield "factor_grid", sheet.figure

    @staticmethod
    def _split(sweep: Sweep) -> tuple[str, str]:
        """The factors of the rows and of the columns: the look, if it is one, heads the columns."""
        first, second = sweep.factors
        return (second, first) if _target(first) == "target_look" else (first, second)


def _target(key: str) -> str:
    """The picture that stands for the values of this factor, if it chooses a photo."""
    group, _, name = key.rpartition(".")
    return _TARGETS.get(name, "") if group in ("", "inputs") else ""


def _place(run: Run, row_key: str, column_key: str) -> tuple[Any, Any]:
    return plain(run.overrides.get(row_key)), plain(run.overrides.get(column_key))


def _photo(sweep: Sweep, key: str, value: Any, name: str) -> Picture:
    run = next(run for run in sweep.runs if plain(run.overrides.get(key)) == value)
    return run.folder.read_picture(name)
