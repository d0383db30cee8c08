"""Figures of scores: the table and its texts, the trade-off, its front and its knee."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded_runs import record_sweep
from scored_runs import record_scored_sweep, run_scores

from lmexp.errors import LmexpError
from lmexp.figures.gallery import list_figures, make_all
from lmexp.figures.pareto import Pareto, find_front, find_knee
from lmexp.figures.runs import read_sweep
from lmexp.figures.score_table import escape
from lmexp.recording.run_folder import RunFolder

NUMBERS = [(0.5, 0.30), (0.45, 0.12), (0.2, 0.08), (0.15, 0.20)]
"""Identity and mouth error: three on the front, the second its knee, the last beaten."""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    weights = (16, 4, 1, 0.5)
    record_scored_sweep(
        folder,
        [
            ({"loss.lpips.weight": weight, "seed": k}, run_scores(*numbers))
            for k, (weight, numbers) in enumerate(zip(weights, NUMBERS, strict=True))
        ],
    )
    return folder


def test_table_in_every_form(sweep: Path) -> None:
    written = {path.name: path for path in make_all(sweep, only="score_table")}
    assert set(written) == {f"score_table.{kind}" for kind in ("png", "pdf", "csv", "tex")}
    with Image.open(written["score_table.png"]) as image:
        assert image.width == round(7.16 * 300)
        assert np.asarray(image.convert("L")).min() < 100
    rows = list(csv.DictReader(written["score_table.csv"].read_text().splitlines()))
    names = [row["row"] for row in rows]
    assert names[:3] == ["look unchanged", "look inverted", "expression photo itself"]
    assert [float(row["identity_cosine"]) for row in rows[3:]] == [n[0] for n in NUMBERS]
    assert [float(row["mouth_error"]) for row in rows[:3]] == [0.4, 0.38, 0.0]
    latex = written["score_table.tex"].read_text()
    assert latex.count(r"\\") == 1 + len(rows)
    assert r"\midrule" in latex and r"NME \%" in latex


def test_table_of_runs_without_scores_is_not_made(tmp_path: Path) -> None:
    record_sweep(tmp_path, [{"seed": 0}, {"seed": 1}], video_frames=0)
    with pytest.raises(LmexpError, match=r"score_table: cannot be made of .* no run has scores"):
        make_all(tmp_path, only="score_table")
    with pytest.raises(LmexpError, match=r"it needs three runs with scores .* these are 0"):
        make_all(tmp_path, only="pareto")


def test_recipes_over_pairs_are_rows_of_means(tmp_path: Path) -> None:
    record_scored_sweep(
        tmp_path,
        [({"recipe": name}, run_scores(*n)) for name, n in zip("aabc", NUMBERS, strict=True)],
    )
    # The two of recipe "a" are of two pairs.
    second = RunFolder(tmp_path / "001")
    second.write_summary({**second.read_summary(), "label": "c+d"})
    (table,) = (path for path in make_all(tmp_path, only="score_table") if path.suffix == ".csv")
    rows = {row["row"]: row for row in csv.DictReader(table.read_text().splitlines())}
    assert rows["a"]["pairs"] == "2"
    assert float(rows["a"]["identity_cosine"]) == pytest.approx((0.5 + 0.45) / 2)
    assert rows["b"]["pairs"] == "1"
    text = next(p for p in make_all(tmp_path, only="pareto") if p.suffix == ".txt").read_text()
    assert text.splitlines()[0].startswith("recipe ")
    # scripts/compare_recipes.py leaves a recipe's overrides in the summaries.
    for number, name in enumerate("aabc"):
        run = RunFolder(tmp_path / f"{number:03d}")
        words = [name, f"loss.lpips.mask=[{name}]"]
        run.write_summary({**run.read_summary(), "overrides": words})
    text = next(p for p in make_all(tmp_path, only="pareto") if p.suffix == ".txt").read_text()
    assert text.splitlines()[0].startswith("'loss.lpips.mask=[")


def test_pareto_marks_the_knee_and_gives_its_line(sweep: Path) -> None:
    written = {path.name: path for path in make_all(sweep, only="pareto")}
    assert set(written) == {"pareto.png", "pareto.pdf", "pareto.txt"}
    lines = written["pareto.txt"].read_text().splitlines()
    assert lines[0] == "loss.lpips.weight=4 seed=1"
    cells = [line.split("\t") for line in lines[3:]]
    own = [line for line in cells if line[3].startswith("loss.")]
    assert [line[2] for line in own] == ["yes", "yes", "yes", "no"]
    assert [float(line[0]) for line in own] == pytest.approx([n[0] / 0.5 for n in NUMBERS])
    assert [float(line[1]) for line in own] == pytest.approx([1 - n[1] / 0.4 for n in NUMBERS])


def test_pareto_draws_what_lies_beside(sweep: Path, tmp_path: Path) -> None:
    record_scored_sweep(tmp_path, [({}, run_scores(0.1, 0.1))])
    figure = Pareto(beside=(str(tmp_path / "000"),), measure="nme_aligned.mouth")
    points = figure.points(read_sweep(sweep))
    assert [point.kind for point in points].count("beside") == 1
    assert {point.taken for point in points if point.kind == "sweep"} == {1 - 5 / 9}
    ((stem, drawn),) = figure.draw(read_sweep(sweep))
    assert stem == "pareto"
    # Its own axes, and a picture for each of the five runs that finds room.
    assert len(drawn.axes) == 6


def test_no_picture_of_pareto_hides_a_name_and_no_name_another(tmp_path: Path) -> None:
    # Near the corner where the expression photo itself lies; it has a name and no picture.
    crowd = [({"seed": k}, run_scores(0.05 + 0.02 * k, 0.03 + 0.004 * k)) for k in range(12)]
    record_scored_sweep(tmp_path, crowd)
    ((_, drawn),) = Pareto().draw(read_sweep(tmp_path))
    renderer = drawn.canvas.get_renderer()  # type: ignore[attr-defined]
    plot, *pictures = drawn.axes
    names = {text.get_text(): text.get_window_extent(renderer) for text in plot.texts}
    assert {"look inverted", "expression photo itself"} <= names.keys()
    assert len(pictures) > 6
    for picture in pictures:
        hidden = [name for name, box in names.items() if box.overlaps(picture.bbox)]
        assert not hidden
    for one, other in itertools.combinations(names.values(), 2):
        assert not one.overlaps(other)


def test_runs_that_differ_by_photos_alone_are_one_point(tmp_path: Path) -> None:
    runs = []
    for pair in ("a+b", "c+d"):
        for weight, numbers in zip((16, 4, 1), NUMBERS[:3], strict=True):
            factor = 1.0 if pair == "a+b" else 0.5
            runs.append(
                (
                    {"loss.lpips.weight": weight, "inputs.look": f"{pair[0]}.jpg"},
                    run_scores(factor * numbers[0], factor * numbers[1]),
                )
            )
    record_scored_sweep(tmp_path / "sweep", runs)
    for number in range(3, 6):
        second = RunFolder(tmp_path / "sweep" / f"{number:03d}")
        second.write_summary({**second.read_summary(), "label": "c+d"})
    record_scored_sweep(
        tmp_path / "theirs", [({"inputs.look": f"{k}.jpg"}, run_scores(0.1, 0.2)) for k in "ac"]
    )
    figure = Pareto(beside=(f"published={tmp_path / 'theirs'}",))
    points = figure.points(read_sweep(tmp_path / "sweep"))
    own = [point for point in points if point.kind == "sweep"]
    assert [point.overrides for point in own] == [f"loss.lpips.weight={w}" for w in (16, 4, 1)]
    assert [point.kept for point in own] == pytest.approx([0.75 * n[0] / 0.5 for n in NUMBERS[:3]])
    (beside,) = [point for point in points if point.kind == "beside"]
    assert beside.label == "published" and beside.kept == pytest.approx(0.2)
    (same,) = {
        point.label
        for point in Pareto(beside=(str(tmp_path / "theirs"),)).points(
            read_sweep(tmp_path / "sweep")
        )
        if point.kind == "beside"
    }
    assert same == "weights"  # the sweep's own name


def test_runs_far_beyond_the_inversion_are_in_the_plot(tmp_path: Path) -> None:
    record_scored_sweep(
        tmp_path,
        [
            ({"seed": k}, run_scores(*n))
            for k, n in enumerate([(0.9, 0.3), (0.7, 0.1), (0.2, 0.05)])
        ],
    )
    ((_, drawn),) = Pareto().draw(read_sweep(tmp_path))
    low, high = drawn.axes[0].get_xlim()
    assert low < 0.4 and 1.8 < high < 2.2


def test_front_leaves_out_what_is_beaten() -> None:
    points = [(0.0, 3.0), (1.0, 2.0), (1.0, 1.0), (2.0, 1.0), (0.5, 0.5), (2.0, 1.0)]
    assert [points[i] for i in find_front(points)] == [(2.0, 1.0), (1.0, 2.0), (0.0, 3.0)]


@pytest.mark.parametrize(
    ("front", "knee"),
    [
        ([(1.0, 0.0), (0.8, 0.7), (0.0, 1.0)], 1),
        ([(100.0, 0.0), (90.0, 0.001), (40.0, 0.009), (0.0, 0.01)], 2),
        ([(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)], 0),
        ([(3.0, 2.0)], 0),
    ],
)
def test_knee_is_farthest_from_the_chord(front: list[tuple[float, float]], knee: int) -> None:
    assert find_knee(front) == knee
    if len(front) > 2:
        ends = np.array([front[0], front[-1]])
        unit = np.ptp(ends, axis=0)
        direction = (ends[1] - ends[0]) / unit
        offset = (np.array(front) - ends[0]) / unit
        distance = np.abs(direction[0] * offset[:, 1] - direction[1] * offset[:, 0])
        assert distance[knee] == pytest.approx(distance.max())


def test_latex_is_escaped() -> None:
    assert escape("a_b & 5 % λ\\") == r"a\_b \& 5 \% $\lambda$\textbackslash{}"


def test_both_figures_are_listed() -> None:
    assert {"score_table", "pareto"} <= set(list_figures())
