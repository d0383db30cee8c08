"""All figures of a folder of runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

from lmexp.composition import conf_folder
from lmexp.config import Component
from lmexp.errors import LmexpError
from lmexp.figures.paper import paper_style, save_figure
from lmexp.figures.protocol import PaperFigure, TextFigure
from lmexp.figures.runs import read_sweep
from lmexp.recording.atomic_file import DiskFullError, write_atomically, write_error

_log = logging.getLogger("lmexp.figures")


def list_figures() -> dict[str, Component]:
    """Every figure there is, by name: the files of conf/figure with their own settings."""
    found: dict[str, Component] = {}
    for path in sorted((conf_folder() / "figure").glob("*.yaml")):
        described = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(described, dict)
        found |= {str(name): Component.model_validate(node) for name, node in described.items()}
    return found


def make_all(
    folder: Path, figures: Mapping[str, Component] | None = None, *, only: str | None = None
) -> list[Path]:
    """Make the figures of a run's or a sweep's folder, in its own `figures` folder.

    Unfinished runs are left out, and a figure that says nothing about these runs is
    skipped; a line in the log says so, a warning if the sweep has the figure's name.

    Args:
        folder: a run's folder, or a sweep's with its index.json.
        figures: which ones, by name; None: all of `list_figures`.
        only: name of the only figure to make.

    Returns:
        The files: PNG and PDF, and what a figure writes as text.

    Raises:
        LmexpError: there is no finished run, no such figure, or it cannot be made of these runs.
    """
    figures = list_figures() if figures is None else figures
    if only is not None and only not in figures:
        raise LmexpError(f"--only {only}: no such figure; choose from {', '.join(figures)}")
    sweep = read_sweep(folder)
    for line in sweep.left_out:
        _log.warning("left out: %s", line)
    out = folder / "figures"
    if not figures:
        return []
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(out, error) from error
    written: list[Path] = []
    for name in figures if only is None else [only]:
        built: PaperFigure = figures[name].build()
        try:
            reason = built.why_not(sweep)
            if reason and only is not None:
                raise LmexpError(f"{name}: cannot be made of {folder}: {reason}")
            if reason:
                # A sweep that is named after a figure was run for it.
                level = logging.WARNING if name == sweep.name else logging.INFO
                _log.log(level, "%s: not made: %s", name, reason)
                continue
            with paper_style(built.font_size):
                for stem, figure in built.draw(sweep):
                    written += save_figure(figure, out / stem)
            if isinstance(built, TextFigure):
                for file, text in built.texts(sweep):
                    write_atomically(out / file, text.encode(), durable=False)
                    written.append(out / file)
        except DiskFullError:
            raise
        except LmexpError as error:
            if only is not None:
                raise
            _log.warning("%s: not made: %s", name, error)  # the others may need less of the runs
    return written
