"""The benchmark of pairs: runs, tables, sheet; the same command again; scores later."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from lmexp.composition import conf_folder
from lmexp.errors import LmexpError
from lmexp.figures.runs import read_sweep
from lmexp.metrics.protocol import Exhibits
from lmexp.recording.run_folder import RunFolder
from lmexp.runner import run

SCRIPT = conf_folder().parent / "scripts" / "compare_recipes.py"
TINY = [
    "experiment=debug",
    "loss=[landmarks,prior,noise]",
    "optimizer.steps=2",
    "latent.inversion.steps=2",
    "hardware.threads=1",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_recipes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Flat:
    """Scores that say how bright the result is: enough to tell runs apart."""

    calls = 0

    def score(self, shown: Exhibits, optimised: object = ()) -> list[dict[str, Any]]:
        Flat.calls += 1

        def of(identity: float, error: float) -> dict[str, Any]:
            return {"identity_cosine": identity, "mouth_error": error}

        return [
            {
                "result": of(float(shown.result.mean()) + 2, 0.1),
                "look": of(1.0, 0.4),
                **({"inversion": of(0.5, 0.4)} if shown.inversion is not None else {}),
                "failed": False,
                "failure": "",
                "judges": {"perceptual": "none"},
            }
        ]


def test_runs_then_scores_then_again(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "build_scores", lambda choice: Flat())
    monkeypatch.setattr(Flat, "calls", 0)
    out = tmp_path / "out"
    words = ["--out", str(out), "--looks", "generated:1", "--expressions", "generated:2"]
    words += ["generated:3", "--recipes", "plain=", "mean=latent.start=mean seed=3"]
    words += ["--common", *TINY]
    assert script.main([*words, "--no-scores"]) == 0
    index = json.loads((out / "index.json").read_text())
    assert [job["state"] for job in index["jobs"]] == ["finished"] * 4
    assert Flat.calls == 0

    assert script.main(["--out", str(out), "--score-only"]) == 0
    assert Flat.calls == 4
    said = capsys.readouterr().out
    assert "| plain | 2 | 0 of 2 |" in said and "| *look inverted* | 2 | – | 0.500 |" in said
    report = json.loads((out / "table.json").read_text())
    assert report["recipes"]["mean"]["overrides"][:2] == ["latent.start=mean", "seed=3"]
    assert report["recipes"]["mean"]["command"].startswith("python -m lmexp latent.start=mean")
    assert report["recipes"]["plain"]["seconds_per_job"] > 0
    assert report["device"] and report["versions"]["torch"]
    rows = {row["recipe"]: row for row in csv.DictReader((out / "table.csv").open())}
    assert list(rows) == ["look unchanged", "look inverted", "plain", "mean"]
    assert float(rows["mean"]["mouth_error share of look"]) == pytest.approx(0.25)
    # The mean has no inversion: held against the other's, 0.5.
    kept = float(rows["mean"]["identity_cosine mean"]) / 0.5
    assert float(rows["mean"]["identity_kept"]) == pytest.approx(kept)
    assert len(list(csv.DictReader((out / "scores.csv").open()))) == 4
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width == 5 * (192 + 4)
        # The mean's row has the other recipe's inversion, and no cell is empty.
        for column in range(5):
            cell = sheet.crop((column * 196 + 20, 40, column * 196 + 170, 150))
            assert any(low < 250 for low, _ in cell.getextrema())

    assert script.main(words) == 0  # finished and scored: nothing is done again
    assert Flat.calls == 4
    assert [run.overrides["recipe"] for run in read_sweep(out).runs] == ["plain"] * 2 + ["mean"] * 2

    wanted = (out / "table.md").read_bytes()
    for path in (out / "table.md", out / "sheet.png"):
        path.unlink()
    assert script.main(["--out", str(out), "--tables-only"]) == 0
    assert Flat.calls == 4
    assert (out / "table.md").read_bytes() == wanted and (out / "sheet.png").exists()


def test_a_job_without_a_result_is_counted(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "build_scores", lambda choice: Flat())
    out = tmp_path / "out"
    words = ["--out", str(out), "--looks", "generated:1", str(tmp_path / "none.jpg")]
    words += ["--expressions", "generated:2", "--recipes", "plain=", "--common", *TINY]
    assert script.main(words) == 1
    report = json.loads((out / "table.json").read_text())
    (failure,) = report["failures"]
    assert failure["pair"] == "none + generated:2" and "no file" in failure["reason"]
    (row,) = [row for row in report["rows"] if not row["baseline"]]
    assert (row["pairs"], row["asked"], row["failures"]) == (1, 2, 1)


def test_stopped_by_the_clock_then_gone_on_with(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "build_scores", lambda choice: Flat())
    out = tmp_path / "out"
    words = ["--out", str(out), "--looks", "generated:1", "--expressions", "generated:2"]
    words += ["--recipes", "a=", "b=latent.start=mean", "--common", *TINY]

    def run_one(requests: Any, root: Path, name: str, *, stop: Any, settle: Any) -> None:
        """The runner, whose time is up after the first job."""
        run(requests[:1], root, name, stop=stop, settle=settle)
        stop.ask()
        run(requests, root, name, stop=stop, settle=settle)

    monkeypatch.setattr(script, "run", run_one)
    assert script.main(words) == 1
    said = capsys.readouterr().out
    assert "1 of 2 jobs are left; the same command goes on with them" in said
    assert "| a | 1 | 0 of 1 |" in said and "| b |" not in said
    states = [job["state"] for job in json.loads((out / "index.json").read_text())["jobs"]]
    assert states == ["skipped", "interrupted"]

    monkeypatch.setattr(script, "run", run)
    assert script.main([*words, "--seconds", "600", "--inversion-of", "a"]) == 0
    assert "| b | 1 | 0 of 1 |" in capsys.readouterr().out
    assert script.main([*words, "--inversion-of", "c"]) == 2
    assert "--inversion-of c: no such recipe here; choices: a, b" in capsys.readouterr().err


def test_a_limit_of_time_asks_to_stop(script: ModuleType) -> None:
    with script._limit(0.01) as stop:
        deadline = time.monotonic() + 5
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.requested
    with script._limit(None) as stop:
        assert not stop.requested


@pytest.mark.slow
def test_what_comes_with_the_project_composes(script: ModuleType, tmp_path: Path) -> None:
    args = script._parse(["--out", str(tmp_path)])
    pairs = script.choose_pairs(args)
    assert len(pairs) >= 24 and len(set(pairs)) == len(pairs)
    assert all(pair.look != pair.expression for pair in pairs)
    assert all(":" in name for pair in pairs for name in (pair.look, pair.expression))
    recipes = script.choose_recipes(None, args.recipes_file)
    assert {"default", "published", "published_w_plus", "no_mask", "no_prior"} <= set(recipes)
    for overrides in recipes.values():
        ((_, config),) = script._compose([*script.QUIET, *overrides], pairs[:1], tmp_path)
        assert config.inputs.look == pairs[0].look
        assert config.recording.video_frames == 0
    ((_, published),) = script._compose(recipes["published"], pairs[:1], tmp_path)
    assert published.optimizer.steps == 1000


def test_photos_are_paired_by_seed(script: ModuleType, tmp_path: Path) -> None:
    photos = [f"{k}.jpg" for k in range(5)]
    pairs = script.draw_pairs(photos, 12, seed=1)
    assert len(pairs) == len(set(pairs)) == 12
    assert all(pair.look != pair.expression for pair in pairs)
    assert {pair.look for pair in pairs[:5]} == {pair.expression for pair in pairs[:5]}
    assert pairs == script.draw_pairs(photos, 12, seed=1) != script.draw_pairs(photos, 12, seed=2)
    for name in photos:
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    args = script._parse(["--out", "x", "--photos", str(tmp_path), "--count", "3"])
    assert len(script.choose_pairs(args)) == 3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--recipes", "defualt"], "--recipes defualt: not in"),
        (["--recipes", "a=loss.lpips.weigth=1"], "loss.lpips.weigth: no such key"),
        (["--pairs", "none.yaml"], "none.yaml: cannot be read"),
        (["--pairs", "odd.yaml"], "odd.yaml: 3: a pair is [look, expression]"),
        (["--recipes-file", "odd.yaml"], "odd.yaml: names with overrides is expected"),
        (["--photos", "."], "two photos at least are needed, there are 0"),
        (["--score-only"], "index.json: missing; run this script without --score-only first"),
    ],
)
def test_bad_input_is_one_line(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.yaml").write_text("[3]")
    assert script.main(["--out", "out", *words]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1


def test_a_damaged_index_is_one_line(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"jobs": [{}]}')
    with pytest.raises(LmexpError, match=r"index\.json: damaged"):
        script.read_index(tmp_path)
    assert RunFolder(tmp_path).read_status() is None
    for words in (
        ["--looks", "a"],
        ["--no-scores", "--score-only"],
        ["--tables-only", "--score-only"],
    ):
        with pytest.raises(SystemExit):
            script._parse(["--out", "x", *words])
