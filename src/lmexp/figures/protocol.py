"""What makes a class a figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from matplotlib.figure import Figure

from lmexp.figures.runs import Sweep


class PaperFigure(Protocol):
    """What conf/figure/*.yaml builds.

    Attributes:
        font_size: pt.
    """

    font_size: float

    def why_not(self, sweep: Sweep) -> str:
        """Why this figure says nothing about these runs; empty if it does."""
        ...

    def draw(self, sweep: Sweep) -> Iterator[tuple[str, Figure]]:
        """Yield the file's stem and the figure, once a page; called inside `paper_style`."""
        ...


@runtime_checkable
class TextFigure(Protocol):
    """A figure that is also written as text: a table's numbers, for other programs."""

    def texts(self, sweep: Sweep) -> Iterator[tuple[str, str]]:
        """Yield a file's name and what stands in it."""
        ...
