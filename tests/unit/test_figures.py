from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recorded_runs import STEPS, record_run, record_sweep, write_index

from lmexp.figures.__main__ import main
from lmexp.figures.factor_grid import FactorGrid
from lmexp.figures.gallery import list_figures, make_all
from lmexp.figures.loss_curves import LossCurves, _log_ticks
from lmexp.figures.nme_table import NmeTable
from lmexp.figures.paper import balance_columns, paper_style, pick_colours, wrap
from lmexp.figures.runs import Sweep, read_sweep, shorten_keys, show_value
from lmexp.figures.triptych import Triptych
from lmexp.figures.weights_grid import WeightsGrid
from lmexp.recording.run_folder import RunFolder

WEIGHTS = ("reference", "uniform", "mouth", "eyes", "brows", "none")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    record_sweep(folder, [{"landmark_weights": name} for name in WEIGHTS], video_frames=0)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    chosen = [(look, expression) for look in ("ann", "bo", "cy") for expression in ("joy", "rage")]
    record_sweep(
        folder,
        [{"inputs.look": look, "inputs.expression": expression} for look, expression in chosen],
        name="pairs",
        video_frames=0,
    )
    return folder


@pytest.fixture(scope="module")
def lambdas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lambdas")
    chosen = [(lpips, landmarks) for lpips in (0.5, 1.0) for landmarks in (0.05, 0.2)]
    record_sweep(
        folder,
        [{"loss.lpips.weight": a, "loss.landmarks.weight": b} for a, b in chosen[:-1]],
        name="lambdas",
        video_frames=0,
    )
    return folder


def draw(figure: Any, sweep: Sweep) -> dict[str, Any]:
    assert figure.why_not(sweep) == ""
    with paper_style(figure.font_size):
        return dict(figure.draw(sweep))


def texts(figure: Any) -> list[str]:
    found = [text.get_text() for text in figure.texts]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return found


def pictures(figure: Any) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def is_same(shown: np.ndarray, folder: RunFolder, name: str) -> bool:
    size = shown.shape[1::-1]
    resampled = Image.fromarray(folder.read_picture(name)).resize(size, Image.Resampling.LANCZOS)
    return bool(np.array_equal(shown, np.asarray(resampled)))


def test_a_sweep_makes_its_figures_png_and_pdf(weights: Path) -> None:
    written = make_all(weights)
    stems = ("loss_curves", "nme_table", "triptych", "weights_grid")
    assert [path.name for path in written] == [
        f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")
    ]
    for path in written:
        assert path.parent == weights / "figures"
        assert path.read_bytes()[:4] == (b"\x89PNG" if path.suffix == ".png" else b"%PDF")


@pytest.mark.parametrize(
    ("name", "width"),
    [("triptych", 3.5), ("weights_grid", 7.16), ("loss_curves", 7.16), ("nme_table", 7.16)],
)
def test_figures_have_the_width_of_a_column_or_a_page(
    weights: Path, name: str, width: float
) -> None:
    png, pdf = make_all(weights, only=name)
    with Image.open(png) as image:
        assert image.width == pytest.approx(width * 300, abs=1)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", pdf.read_bytes())
    assert box is not None
    assert float(box[1]) / 72 == pytest.approx(width, abs=0.01)
    assert b"/Type3" not in pdf.read_bytes()


def test_the_same_bytes_again_and_in_another_process(weights: Path, pairs: Path) -> None:
    first = {path: path.read_bytes() for path in make_all(weights)}
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo"}
    environment["SOURCE_DATE_EPOCH"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "lmexp.figures", str(weights)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.splitlines() == [str(path) for path in first]
    assert done.stderr.splitlines() == [
        "factor_grid: not made: it needs two factors, these runs have 1",
        "pareto: not made: it needs three runs with scores (identity and landmarks) and with an "
        "inversion, these are 0",
        "score_table: not made: no run has scores",
        "strip: not made: a run did not start from its look's inversion",
    ]
    assert {path: path.read_bytes() for path in first} == first
    grid = {path: path.read_bytes() for path in make_all(pairs, only="factor_grid")}
    assert {path: path.read_bytes() for path in make_all(pairs, only="factor_grid")} == grid


def test_the_users_own_style_changes_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib as mpl

    png, pdf = make_all(weights, only="nme_table")
    before = png.read_bytes(), pdf.read_bytes()
    with mpl.rc_context({"font.size": 30, "font.family": "serif", "savefig.bbox": "tight"}):
        make_all(weights, only="nme_table")
    assert (png.read_bytes(), pdf.read_bytes()) == before


def test_figures_need_no_torch() -> None:
    code = (
        "import sys; import lmexp.figures.__main__, lmexp.figures.triptych; "
        "import lmexp.figures.factor_grid; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_triptych_shows_look_projection_and_landmark_image(weights: Path) -> None:
    sweep = read_sweep(weights)
    drawn = draw(Triptych(), sweep)
    assert list(drawn) == ["triptych"]
    shown = pictures(drawn["triptych"])
    names = ("target_look", "proj", "target_expression_landmarks")
    assert len(shown) == 3 * len(WEIGHTS)
    for index, picture in enumerate(shown):
        assert is_same(picture, sweep.runs[index // 3].folder, names[index % 3])
    assert texts(drawn["triptych"]) == ["look", "projection", "landmark image", *WEIGHTS]


def test_a_long_triptych_takes_several_pages(weights: Path) -> None:
    drawn = draw(Triptych(rows=4, columns=("target_look", "proj")), read_sweep(weights))
    assert list(drawn) == ["triptych_1", "triptych_2"]
    assert [len(pictures(page)) for page in drawn.values()] == [8, 4]


def test_long_grids_and_tables_take_several_pages(weights: Path) -> None:
    sweep = read_sweep(weights)
    drawn = draw(WeightsGrid(columns=3, rows=2), sweep)
    assert list(drawn) == ["weights_grid_1", "weights_grid_2"]
    assert [len(pictures(page)) for page in drawn.values()] == [6, 2]
    drawn = draw(NmeTable(rows=4), sweep)
    assert list(drawn) == ["nme_table_1", "nme_table_2"]
    names = [[text for text in texts(page) if text in WEIGHTS] for page in drawn.values()]
    assert names == [list(WEIGHTS[:4]), list(WEIGHTS[4:])]


def test_a_lost_picture_costs_only_the_figures_that_show_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    record_run(tmp_path / "run", video_frames=0)
    (tmp_path / "run" / "proj.png").unlink()
    stems = {path.stem for path in make_all(tmp_path / "run")}
    assert stems == {"loss_curves", "nme_table"}
    assert "triptych: not made" in caplog.text and "proj.png: missing" in caplog.text
    assert "proj.png: missing" in refused(capsys, str(tmp_path / "run"), "--only", "triptych")


def test_the_grid_shows_the_pair_once_and_every_projection(weights: Path) -> None:
    sweep = read_sweep(weights)
    figure = draw(WeightsGrid(), sweep)["weights_grid"]
    shown = pictures(figure)
    assert is_same(shown[0], sweep.runs[0].folder, "target_look")
    assert is_same(shown[1], sweep.runs[0].folder, "target_expression")
    for picture, run in zip(shown[2:], sweep.runs, strict=True):
        assert is_same(picture, run.folder, "proj")
    score = f"NME {sweep.runs[2].nme['all']:.1f} %"
    assert texts(figure)[:2] == ["look", "expression"]
    assert texts(figure)[texts(figure).index("mouth") + 1] == score
    assert not any(
        text.startswith("NME")
        for text in texts(draw(WeightsGrid(scores=False), sweep)["weights_grid"])
    )


def test_photos_as_factors_stand_in_the_margins(pairs: Path) -> None:
    sweep = read_sweep(pairs)
    figure = draw(FactorGrid(), sweep)["factor_grid"]
    shown = pictures(figure)
    assert len(shown) == 3 + 2 + 6
    assert texts(figure) == ["look", "expression"]
    for column in range(3):  # the looks head the columns
        assert is_same(shown[column], sweep.runs[2 * column].folder, "target_look")
    assert is_same(shown[3], sweep.runs[0].folder, "target_expression")
    assert is_same(shown[5], sweep.runs[2].folder, "proj")
    assert is_same(shown[10], sweep.runs[5].folder, "proj")
    assert WeightsGrid().why_not(sweep) == "the runs have different photos"


def test_numbers_as_factors_are_words_and_a_missing_run_is_named(lambdas: Path) -> None:
    sweep = read_sweep(lambdas)
    figure = draw(FactorGrid(), sweep)["factor_grid"]
    assert len(pictures(figure)) == 3
    assert texts(figure) == [
        "landmarks weight",
        "lpips weight",
        "0.05",
        "0.2",
        "0.5",
        "1",
        "not run",
    ]
    assert sweep.labels[0] == "lpips weight = 0.5, landmarks weight = 0.05"


def test_two_runs_in_one_cell_are_no_grid(lambdas: Path, tmp_path: Path) -> None:
    index = json.loads((lambdas / "index.json").read_text())
    for job in index["jobs"]:
        job["folder"] = os.path.relpath(lambdas / job["folder"], tmp_path)
    write_index(tmp_path, [*index["jobs"], index["jobs"][0]])
    assert FactorGrid().why_not(read_sweep(tmp_path)) == "several runs share a cell"


def test_curves_of_a_sweep_are_the_recorded_numbers(weights: Path) -> None:
    sweep = read_sweep(weights)
    figure = draw(LossCurves(), sweep)["loss_curves"]
    total, *panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["lpips", "", "landmarks", "", "prior", ""]
    assert texts(figure) == list(WEIGHTS)
    recorded = [line["loss"] for line in sweep.runs[4].metrics]
    assert np.array_equal(total.get_lines()[4].get_ydata(), recorded)
    for axes, kind in ((panels[2], "raw"), (panels[3], "weighted")):
        recorded = [line[kind]["landmarks"] for line in sweep.runs[1].metrics]
        assert np.array_equal(axes.get_lines()[1].get_ydata(), recorded)
        assert axes.get_yscale() == "log"
        assert len(axes.get_lines()) == len(WEIGHTS)


def test_curves_of_one_run_have_all_terms_together(weights: Path) -> None:
    figure = draw(LossCurves(), read_sweep(weights / "002"))["loss_curves"]
    raw, weighted = figure.axes
    assert (len(raw.get_lines()), len(weighted.get_lines())) == (3, 4)
    assert texts(figure) == ["lpips", "landmarks", "prior", "total"]
    assert figure.get_figwidth() == 3.5


def test_a_term_of_zeros_has_no_logarithm_and_does_no_harm(tmp_path: Path) -> None:
    folder = record_run(tmp_path / "run", video_frames=0).folder
    path = folder.path / "metrics.jsonl"
    lines = folder.read_metrics()
    for line in lines:
        line["raw"]["flat"] = 0.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert make_all(folder.path, only="loss_curves")[0].is_file()


@pytest.mark.parametrize("low", [-6.3, -2.0, 0.02, 3.9])
@pytest.mark.parametrize("span", [0.04, 0.1, 0.3, 0.9, 2.5, 6.0, 14.0])
def test_log_axes_have_two_to_five_round_ticks(low: float, span: float) -> None:
    ticks = _log_ticks(low, low + span)
    assert 2 <= len(ticks) <= 5
    assert ticks == sorted(ticks)
    assert all(10**low * 0.999 <= tick <= 10 ** (low + span) * 1.001 for tick in ticks)


def test_the_table_holds_the_summaries_numbers_and_the_best_is_bold(weights: Path) -> None:
    sweep = read_sweep(weights)
    figure = draw(NmeTable(), sweep)["nme_table"]
    cells = [text for text in figure.texts if re.fullmatch(r"\d+\.\d", text.get_text())]
    assert len(cells) == 10 * len(WEIGHTS)
    expected = [f"{run.nme[name]:.1f}" for name in sweep.runs[0].nme for run in sweep.runs]
    assert [cell.get_text() for cell in cells] == expected
    for column, name in enumerate(sweep.runs[0].nme):
        values = [run.nme[name] for run in sweep.runs]
        bold = [
            cell.get_fontweight() == "bold"
            for cell in cells[column * len(WEIGHTS) : (column + 1) * len(WEIGHTS)]
        ]
        assert bold == [value == min(values) for value in values]


def test_a_group_that_one_run_did_not_measure_is_a_dash(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record_run(tmp_path / name, video_frames=0)
    summary = RunFolder(tmp_path / "a").read_summary()
    summary["nme"]["jaw"] = None
    RunFolder(tmp_path / "a").write_summary(summary)
    jobs = [{"folder": name, "label": name, "overrides": {}} for name in ("a", "b")]
    write_index(tmp_path, jobs)
    assert "–" in texts(draw(NmeTable(), read_sweep(tmp_path))["nme_table"])
    for name in ("a", "b"):
        RunFolder(tmp_path / name).write_summary({**summary, "nme": {}})
    assert NmeTable().why_not(read_sweep(tmp_path)) == "no run has its NME measured"


def test_a_single_run_makes_the_figures_that_say_something(weights: Path) -> None:
    names = {path.stem for path in make_all(weights / "000")}
    assert names == {"triptych", "loss_curves", "nme_table"}


def test_a_sweep_misses_the_figure_that_it_is_named_after(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="lmexp.figures")  # as for a sweep
    record_run(tmp_path / "run", video_frames=0)
    job = {"folder": "run", "label": "run", "overrides": {"loss.prior.weight": 1}}
    for name in ("weights", "pareto"):
        write_index(tmp_path, [job], name=name)
        make_all(tmp_path)
    (said,) = (record.getMessage() for record in caplog.records if record.name == "lmexp.figures")
    assert said.startswith("pareto: not made: it needs three runs with scores")


def test_unfinished_runs_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = []
    for name in ("good", "cut", "never", "failed"):
        jobs.append({"folder": name, "label": f"the {name} one", "overrides": {"seed": len(jobs)}})
    record_run(tmp_path / "good", video_frames=0)
    record_run(tmp_path / "cut", stop_after=3).interrupt(step=3)
    record_run(tmp_path / "failed", stop_after=3).fail("loss is NaN", step=3)
    write_index(tmp_path, jobs)
    sweep = read_sweep(tmp_path)
    assert [run.label for run in sweep.runs] == ["the good one"]
    assert sweep.left_out == (
        f"the cut one (cut): interrupted at step 3 of {STEPS}",
        "the never one (never): not started",
        f"the failed one (failed): failed at step 3 of {STEPS}: loss is NaN",
    )
    make_all(tmp_path, only="nme_table")
    assert [record.getMessage() for record in caplog.records if record.name == "lmexp.figures"] == [
        f"left out: {line}" for line in sweep.left_out
    ]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("lmexp: ")
    return line


def test_bad_input_is_one_line(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no runs here" in refused(capsys, str(tmp_path))
    assert "no runs here" in refused(capsys, str(tmp_path / "missing"))
    assert "choose from factor_grid, loss_curves" in refused(capsys, str(weights), "--only", "x")
    assert "needs two factors" in refused(capsys, str(weights), "--only", "factor_grid")
    (tmp_path / "index.json").write_text('{"name": "a"}')
    assert "index.json: damaged (KeyError" in refused(capsys, str(tmp_path))
    write_index(tmp_path, [])
    assert "its index is empty" in refused(capsys, str(tmp_path))
    write_index(tmp_path, [{"folder": "000", "label": "mouth", "overrides": {}}])
    assert "mouth (000): not started" in refused(capsys, str(tmp_path))
    record_run(tmp_path / "000", video_frames=0)
    (tmp_path / "figures").write_text("in the way")
    assert "figures: cannot be written" in refused(capsys, str(tmp_path))


def test_the_command_prints_what_it_made(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(weights), "--only", "nme_table"]) == 0
    figures = weights / "figures"
    assert capsys.readouterr().out.splitlines() == [
        str(figures / "nme_table.png"),
        str(figures / "nme_table.pdf"),
    ]


def test_every_figure_has_a_yaml() -> None:
    assert set(list_figures()) == {
        "triptych",
        "strip",
        "weights_grid",
        "factor_grid",
        "loss_curves",
        "nme_table",
        "score_table",
        "pareto",
    }


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["landmark_weights.outer_lip"], ["outer lip"]),
        (["loss.lpips.weight", "loss.landmarks.weight"], ["lpips weight", "landmarks weight"]),
        (["optimizer.steps", "latent.inversion.steps"], ["optimizer steps", "inversion steps"]),
        (["seed"], ["seed"]),
        (["latent.space", "space"], ["latent space", "space"]),
    ],
)
def test_keys_are_shortened_as_far_as_they_stay_apart(keys: list[str], names: list[str]) -> None:
    assert shorten_keys(keys) == names


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.05, "0.05"),
        ("5.0", "5"),
        (3, "3"),
        (True, "yes"),
        (False, "no"),
        (None, "default"),
        ("w_plus", "w plus"),
        ("photos/a_face.jpg", "a face"),
        ("me.PNG", "me"),
    ],
)
def test_values_are_shown_for_people(value: Any, shown: str) -> None:
    assert show_value(value) == shown


def test_labels_name_what_differs_and_nothing_else(tmp_path: Path) -> None:
    overrides: list[dict[str, Any]] = [
        {"seed": 1, "landmark_weights": "mouth"},
        {"seed": 1, "landmark_weights": "mouth", "landmark_weights.outer_lip": 5},
        {"seed": 1},
    ]
    for number in range(3):
        RunFolder(tmp_path / str(number)).create().write_status("finished", step=1, steps=1)
    jobs = [
        {"folder": str(number), "label": "x", "overrides": differing}
        for number, differing in enumerate(overrides)
    ]
    write_index(tmp_path, jobs)
    sweep = read_sweep(tmp_path)
    assert sweep.labels == ["mouth", "mouth, outer lip = 5", "default"]
    assert LossCurves().why_not(sweep) == "no run has metrics"


def test_columns_are_balanced_and_long_labels_wrapped() -> None:
    assert [balance_columns(cells, 6) for cells in (3, 6, 8, 11, 13)] == [3, 6, 4, 6, 5]
    assert wrap("outer lip = 5", 3.0, 8) == ["outer lip = 5"]
    lines = wrap("lpips weight = 0.5, landmarks weight = 0.05, seed = 3", 1.2, 8)
    assert len(lines) == 2 and lines[1].endswith("…") and max(map(len, lines)) <= 19
    assert len(set(pick_colours(8))) == 8 and len(set(pick_colours(30))) == 30
