"""How figures look and are saved: one style, sizes in inches, the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from lmexp.recording.atomic_file import write_atomically

COLUMN_WIDTH = 3.5
"""One column of a two-column page (IEEE and CVF), in."""
PAGE_WIDTH = 7.16
"""Both columns and the gutter, in."""

Width = Annotated[float, Field(gt=1, le=20)]
"""Width of a figure, in."""
FontSize = Annotated[float, Field(ge=4, le=24)]
"""Size of a figure's type, pt."""
Dpi = Annotated[int, Field(ge=72, le=1200)]
"""Pixels an inch of a PNG, and of the pictures inside a PDF."""

INK = "#222222"
GREY = "#777777"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#222222")
"""Okabe and Ito's palette, which colour-blind readers tell apart, on white."""


@contextmanager
def paper_style(font_size: float) -> Iterator[None]:
    """The one style of all figures, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.family": "DejaVu Sans",  # matplotlib brings it along: the same everywhere
                "font.size": font_size,
                "axes.titlesize": font_size,
                "axes.labelsize": font_size,
                "xtick.labelsize": font_size - 1,
                "ytick.labelsize": font_size - 1,
                "legend.fontsize": font_size - 1,
                "text.color": INK,
                "axes.labelcolor": INK,
                "axes.edgecolor": "#999999",
                "axes.linewidth": 0.6,
                "xtick.color": INK,
                "ytick.color": INK,
                "xtick.major.width": 0.6,
                "ytick.major.width": 0.6,
                "xtick.major.size": 2.5,
                "ytick.major.size": 2.5,
                "ytick.minor.size": 1.2,
                "ytick.minor.width": 0.4,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "grid.color": "#e4e4e4",
                "grid.linewidth": 0.5,
                "axes.axisbelow": True,
                "lines.linewidth": 1.0,
                "lines.solid_capstyle": "round",
                "legend.frameon": False,
                "pdf.fonttype": 42,  # embedded TrueType: publishers refuse Type 3
                "svg.hashsalt": "lmexp",
            }
        )
        yield


class Sheet:
    """A figure measured in inches from its upper left corner, on whole pixels.

    Args:
        width: in.
        height: in.
        dpi: pixels an inch.
    """

    def __init__(self, width: float, height: float, dpi: int) -> None:
        self.dpi = dpi
        self.width = round(width * dpi) / dpi
        self.height = round(height * dpi) / dpi
        self.figure = Figure(figsize=(self.width, self.height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)

    def add_picture(self, picture: NDArray[np.uint8], left: float, top: float, side: float) -> None:
        """Place a square picture, resampled once to the sheet's own pixels."""
        pixels = round(side * self.dpi)
        image = Image.fromarray(picture).resize((pixels, pixels), Image.Resampling.LANCZOS)
        axes = self.figure.add_axes(self._box(left, top, pixels / self.dpi, pixels / self.dpi))
        axes.imshow(np.asarray(image), interpolation="none", aspect="auto")
        axes.set_axis_off()

    def add_axes(self, left: float, top: float, width: float, height: float) -> mpl.axes.Axes:
        """Axes whose frame (not its labels) fills the box."""
        axes: mpl.axes.Axes = self.figure.add_axes(self._box(left, top, width, height))
        return axes

    def add_text(
        self,
        text: str,
        left: float,
        top: float,
        *,
        align: str = "center",
        anchor: str = "center",
        size: float | None = None,
        colour: str = INK,
        rotation: float = 0.0,
        weight: str = "normal",
    ) -> None:
        """Text at a point; `align` is horizontal, `anchor` vertical, `size` in pt."""
        self.figure.text(
            left / self.width,
            1 - top / self.height,
            text,
            ha=align,
            va=anchor,
            fontsize=size,
            color=colour,
            rotation=rotation,
            fontweight=weight,
        )

    def _box(
        self, left: float, top: float, width: float, height: float
    ) -> tuple[float, float, float, float]:
        # Whole pixels from the lower left: pictures stay sharp and edges line up.
        def snap(inches: float) -> float:
            return round(inches * self.dpi) / self.dpi

        left, width, height = snap(left), snap(width), snap(height)
        bottom = snap(self.height - snap(top) - height)
        return (
            left / self.width,
            bottom / self.height,
            width / self.width,
            height / self.height,
        )


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.pdf without dates or versions, so that bytes are comparable.

    Call it inside `paper_style`, which holds the settings that take effect on saving.

    Returns:
        The two files.
    """
    written = []
    for kind, metadata in (
        ("png", {"Software": None}),
        ("pdf", {"Creator": None, "Producer": None, "CreationDate": None, "ModDate": None}),
    ):
        encoded = io.BytesIO()
        figure.savefig(encoded, format=kind, metadata=metadata, dpi=figure.dpi)
        # Not with_suffix: a label such as "lr 0.1" has a dot of its own.
        path = stem.parent / f"{stem.name}.{kind}"
        write_atomically(path, encoded.getvalue(), durable=False)
        written.append(path)
    return written


def pick_colours(count: int) -> list[str]:
    """`count` colours for lines: distinct ones while they last, then shades in order."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.92, count))
    return [mpl.colors.to_hex(shade) for shade in shades]


def balance_columns(cells: int, most: int) -> int:
    """Columns, at most `most`, that fill the fewest rows as evenly as they can."""
    rows = -(-cells // most)
    return -(-cells // rows)


def split_pages(stem: str, count: int, most: int) -> list[tuple[str, range]]:
    """Share `count` things among pages of at most `most`: the page's stem and its things.

    One page is `stem` itself, several are `stem`_1, `stem`_2, …
    """
    pages = [range(first, min(first + most, count)) for first in range(0, count, most)]
    if len(pages) == 1:
        return [(stem, pages[0])]
    return [(f"{stem}_{number}", page) for number, page in enumerate(pages, start=1)]


def wrap(text: str, width: float, font_size: float, *, most: int = 2) -> list[str]:
    """Break text at its spaces into at most `most` lines of about `width` inches.

    DejaVu Sans takes about 0.56 of its size a character; a last line that is still too
    long is cut with an ellipsis.
    """
    room = max(4, int(width * 72 / (0.56 * font_size)))
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [line if len(line) <= room else line[: room - 1].rstrip() + "…" for line in lines]


def label_room(labels: Sequence[str], width: float, font_size: float, most: float) -> float:
    """Inches for labels of one line: what they need, at most `width`, but for labels that could not
    be told apart then; `most` in any case."""
    needed = max(len(label) for label in labels) * font_size * 0.56 / 72 + 0.1
    if needed <= width:
        return needed
    shown = {wrap(label, width, font_size, most=1)[0] for label in labels}
    return width if len(shown) == len(set(labels)) else min(needed, most)


def text_lines(texts: Sequence[str], width: float, font_size: float) -> int:
    """How many lines the longest of the texts takes at that width."""
    return max((len(wrap(text, width, font_size)) for text in texts), default=0)
