"""What independent judges say of every run, and of the pictures that it is held against."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Annotated

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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
from lmexp.metrics.table import COLUMNS, Column, Row, ScoredRun, tabulate


class ScoreTable:
    """A table, runs × scores, the baselines' means above; docs/scores.md defines the numbers.

    Runs of one recipe over several pairs (the factor `recipe`) are one row of means.

    Args:
        width: of the figure, in.
        label_width: most of the width that the rows' names take, in.
        rows: most rows on one page.
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
        """It needs the scores of at least one run."""
        return "" if any(run.scores for run in sweep.runs) else "no run has scores"

    def draw(self, sweep: Sweep) -> Iterator[tuple[str, Figure]]:
        """Yield "score_table", or "score_table_1", … if one page is not enough."""
        rows = score_rows(sweep)
        columns = [column for column in COLUMNS if any(column.key in row.means for row in rows)]
        for stem, page in split_pages("score_table", len(rows), self.rows):
            yield stem, self._draw_page(rows[page.start : page.stop], columns)

    def texts(self, sweep: Sweep) -> Iterator[tuple[str, str]]:
        """Yield "score_table.csv" and "score_table.tex" with what stands in them."""
        rows = score_rows(sweep)
        columns = [column for column in COLUMNS if any(column.key in row.means for row in rows)]
        yield "score_table.csv", write_csv(rows, columns)
        yield "score_table.tex", write_latex(rows, columns)

    def _draw_page(self, rows: Sequence[Row], columns: Sequence[Column]) -> Figure:
        line = self.font_size / 72 * 1.25
        row_height = line + 0.05
        names = [row.name for row in rows]
        label_width = label_room(names, self.label_width, self.font_size, self.width * 0.4)
        cell = (self.width - label_width) / len(columns)
        titles = [f"{column.title} {column.unit}".strip() for column in columns]
        size = self.font_size - 2
        heads = [wrap(title, cell, size, most=4) for title in titles]
        head = size / 72 * 1.25 * max(len(lines) for lines in heads) + 0.06
        foot = line + 0.03
        sheet = Sheet(self.width, head + len(rows) * row_height + foot, self.dpi)
        for place, lines in enumerate(heads):
            middle = label_width + (place + 0.5) * cell
            sheet.add_text("\n".join(lines), middle, head - 0.04, anchor="bottom", size=size)
        above = sum(row.baseline for row in rows)
        for y in {head, head + above * row_height}:
            height = 1 - y / sheet.height
            sheet.figure.add_artist(Line2D((0, 1), (height, height), color=GREY, linewidth=0.6))
        for index, row in enumerate(rows):
            middle = head + (index + 0.5) * row_height
            colour = GREY if row.baseline else INK
            # Digits and underscores are wider than letters.
            (text,) = wrap(row.name, label_width * 0.9, self.font_size, most=1)
            sheet.add_text(text, 0.0, middle, align="left", colour=colour)
            for place, column in enumerate(columns):
                sheet.add_text(
                    show(row, column), label_width + (place + 0.5) * cell, middle, colour=colour
                )
        note = "by networks that were not optimised; means where a row has several pairs"
        y = sheet.height - foot / 2 + 0.01
        sheet.add_text(note, self.width, y, align="right", size=self.font_size - 1, colour=GREY)
        return sheet.figure


def score_rows(sweep: Sweep) -> list[Row]:
    """Baselines, then runs (or recipes, where that is a factor) by their labels."""
    by_recipe = "recipe" in sweep.factors
    scored = [
        ScoredRun(
            recipe=str(run.overrides["recipe"]) if by_recipe else label,
            pair=str(run.summary.get("label", run.label)),
            scores=run.scores,
        )
        for run, label in zip(sweep.runs, sweep.labels, strict=True)
    ]
    return tabulate(scored)


def show(row: Row, column: Column) -> str:
    """A mean as it stands in the table."""
    value = row.means.get(column.key)
    return "–" if value is None else f"{value:.{column.digits}f}"


def write_csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The means in full, a line a row; empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "baseline", "pairs", *(column.key for column in columns)])
    for row in rows:
        means = [row.means.get(column.key, "") for column in columns]
        writer.writerow([row.name, row.baseline, row.pairs, *means])
    return text.getvalue()


def write_latex(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A tabular of the package booktabs."""
    heads = [escape(f"{column.title} {column.unit}".strip()) for column in columns]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        rf" & {' & '.join(heads)} \\",
        r"\midrule",
    ]
    for index, row in enumerate(rows):
        if index and rows[index - 1].baseline and not row.baseline:
            lines.append(r"\midrule")
        cells = [show(row, column).replace("–", "--") for column in columns]
        lines.append(rf"{escape(row.name)} & {' & '.join(cells)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escape(text: str) -> str:
    """Text as LaTeX takes it."""
    special = {char: f"\\{char}" for char in "%&_#${}"} | {"\\": r"\textbackslash{}"}
    special |= {"λ": r"$\lambda$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(char, char) for char in text)
