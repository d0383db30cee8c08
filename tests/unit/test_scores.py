"""Scores: what is measured of whom, by whom, and what happens where a judge is missing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from recorded_runs import astronaut, face_landmarks, image_tensor, record_run
from scored_runs import run_scores

from lmexp.composition import conf_folder
from lmexp.errors import LmexpError
from lmexp.losses.prior import GaussianSpace
from lmexp.metrics import __main__ as command
from lmexp.metrics import independent
from lmexp.metrics.dlib_judge import DlibJudge, Verdict, identity_mean
from lmexp.metrics.independent import IndependentScores
from lmexp.metrics.protocol import Exhibits, NoScores, Scores
from lmexp.metrics.report import report_scores
from lmexp.metrics.rescoring import Rescorer, find_runs
from lmexp.metrics.table import ScoredRun, flatten, tabulate, write_markdown
from lmexp.recording.run_folder import Picture, RunFolder
from lmexp.weights import store

SIDE = 128


class PretendJudge:
    """Sees in a picture what its mean colour says, as networks of a second would."""

    weights_sha256 = {"landmarks": "l", "identity": "i"}  # noqa: RUF012

    def look_at(self, picture: Picture) -> Verdict:
        red, green, blue = picture.reshape(-1, 3).mean(0) / 255
        identity = identity_mean().copy()
        identity[0] += red
        identity[1] += green
        return Verdict(blue < 0.9, face_landmarks(SIDE, smile=2 * blue).double().numpy(), identity)


class PretendNetwork(torch.nn.Module):
    weights_sha256 = "p"
    seen: list[tuple[int, ...]] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.channel_weights = [torch.ones(3)]

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.seen.append(tuple(images.shape))
        return [images + 2]


class PretendFan(torch.nn.Module):
    """Heat maps of the face that `PretendJudge` sees, as a network of a second would draw them."""

    seen: list[str] = []  # noqa: RUF012

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = self.weights_sha256 = variant

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        (image,) = images
        self.seen.append(self.variant)
        blue = float(image[2].mean()) / 2 + 0.5
        x, y = face_landmarks(SIDE, smile=2 * blue).T[:, :, None, None] / 4 - 0.5
        places = torch.arange(SIDE / 4)
        return torch.exp(-((places - x) ** 2 + (places[:, None] - y) ** 2) / 4)[None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Networks that cost nothing; the list of perceptual ones that were asked for."""
    asked: list[str] = []
    monkeypatch.setattr(independent, "DlibJudge", PretendJudge)
    monkeypatch.setattr(independent, "EmbeddedFan", PretendFan)
    monkeypatch.setattr(
        independent, "load_network", lambda name: asked.append(name) or PretendNetwork()
    )
    return asked


def flat(red: float, green: float, blue: float) -> torch.Tensor:
    return (torch.tensor([red, green, blue]) * 2 - 1)[:, None, None].expand(3, SIDE, SIDE)


def exhibits(*results: torch.Tensor, **more: Any) -> Exhibits:
    jobs = len(results)
    look, expression = flat(0.8, 0.0, 0.0), flat(0.0, 0.8, 0.5)
    points = face_landmarks(SIDE)[None].expand(jobs, -1, -1)
    return Exhibits(
        result=torch.stack(results),
        look=look.expand(jobs, -1, -1, -1),
        expression=expression.expand(jobs, -1, -1, -1),
        look_landmarks=points,
        expression_landmarks=points,
        **more,
    )


def test_numbers_by_hand(pretend: list[str]) -> None:
    half = flat(0.8, 0.8, 0.25)
    (row,) = IndependentScores(side=SIDE).score(exhibits(half, inversion=half[None]))
    assert row["look"]["identity_cosine"] == pytest.approx(1)
    assert row["look"]["identity_distance"] == pytest.approx(0)
    assert row["look"]["leak_cosine"] == pytest.approx(0, abs=1e-6)
    assert row["result"]["identity_cosine"] == pytest.approx(np.sqrt(0.5), abs=1e-3)
    assert row["result"]["identity_distance"] == pytest.approx(0.8, abs=5e-3)
    assert row["identity_kept"] == pytest.approx(1)
    assert row["expression"]["nme"]["mouth"] == row["expression"]["mouth_error"] == 0
    # The mouth opens by 1 + smile: half way in blue is half way there.
    opening = row["look"]["mouth_error"]
    assert row["result"]["mouth_error"] == pytest.approx(opening / 2, rel=0.02)
    assert row["result"]["nme"]["mouth"] < row["look"]["nme"]["mouth"]
    assert 0 < row["result"]["nme_aligned"]["all"] < row["look"]["nme_aligned"]["all"]
    outer, inner = (row["look"]["nme"][name] for name in ("outer_lip", "inner_lip"))
    assert row["look"]["nme"]["mouth"] == pytest.approx((12 * outer + 8 * inner) / 20)
    assert row["look"]["lpips"] == 0 < row["result"]["lpips"] < row["expression"]["lpips"]
    assert row["failed"] is False and row["failure"] == ""
    assert row["judges"] == {
        "dlib_landmarks": "l",
        "dlib_identity": "i",
        "fan": "full",
        "perceptual": "stlpips_vgg",
        "perceptual_weights": "p",
    }


def test_a_second_judge_sees_the_same_shapes(pretend: list[str]) -> None:
    PretendFan.seen.clear()
    scores = IndependentScores(side=SIDE)
    half, more = flat(0.8, 0.8, 0.25), flat(0.1, 0.2, 0.4)
    for picture in (half, more):
        (row,) = scores.score(exhibits(picture, inversion=half[None]))
        for name in ("result", "look", "inversion", "expression"):
            by_fan = row[name]["fan"]
            assert by_fan["mouth_error"] == pytest.approx(row[name]["mouth_error"], abs=0.01)
            for group in ("mouth", "left_eye", "nose_bridge"):  # the jaw leaves the picture
                assert by_fan["nme"][group] == pytest.approx(row[name]["nme"][group], abs=0.05)
            assert set(by_fan) == {key for key in row[name] if "e_error" in key or "nme" in key} | {
                "mouth_error",
                "mouth_aspect_ratio",
                "eye_aspect_ratio",
            }
    # Look, expression and inversion (which is the first result) once.
    assert PretendFan.seen == ["full"] * 4


def test_a_landmark_network_that_was_optimised_is_no_judge(pretend: list[str]) -> None:
    scores = IndependentScores(side=SIDE)
    for optimised, judge in (({"full"}, "slim"), ({"slim"}, "full"), ({"full", "slim"}, None)):
        (row,) = scores.score(exhibits(flat(0, 0, 0)), optimised)
        assert row["judges"].get("fan") == judge
        assert ("fan" in row["result"]) == (judge is not None)


def test_what_changed_does_not_count_outside(pretend: list[str]) -> None:
    points = face_landmarks(SIDE)
    left, top = points[48:].min(0).values.long().tolist()
    right, bottom = points[48:].max(0).values.long().tolist()
    mouth, corner = flat(0.8, 0.0, 0.0).clone(), flat(0.8, 0.0, 0.0).clone()
    mouth[:, top:bottom, left:right] = 1.0
    corner[:, :12, :12] = 1.0
    changed, elsewhere = IndependentScores(side=SIDE).score(exhibits(mouth, corner))
    assert changed["result"]["lpips"] > 1e-3
    assert changed["result"]["lpips_outside"] < 1e-6
    assert elsewhere["result"]["lpips_outside"] > elsewhere["result"]["lpips"] > 1e-4


def test_a_pairs_photos_are_looked_at_once(pretend: list[str]) -> None:
    PretendNetwork.seen.clear()
    scores = IndependentScores(side=SIDE, likeness_side=64)
    half = flat(0.8, 0.8, 0.25)
    (first,) = scores.score(exhibits(half, inversion=half[None]))
    # The look; then result, inversion and expression, each whole and outside of what changed.
    assert PretendNetwork.seen == [(1, 3, 64, 64), (6, 3, 64, 64)]
    (second,) = scores.score(exhibits(flat(0.1, 0.2, 0.3), inversion=half[None]))
    assert PretendNetwork.seen[2:] == [(2, 3, 64, 64)]
    for picture in ("look", "inversion", "expression"):
        assert first[picture] == second[picture]
    assert second["result"]["lpips"] != first["result"]["lpips"] == first["inversion"]["lpips"]
    # Another mask is another measurement.
    moved = exhibits(half, inversion=half[None])
    moved.look_landmarks[:, 48:] -= 20
    (third,) = scores.score(moved)
    assert third["result"]["lpips"] == first["result"]["lpips"]
    assert PretendNetwork.seen[3:] == [(6, 3, 64, 64)]


def test_what_is_remembered_of_likeness_is_bounded(
    pretend: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(independent, "_REMEMBERED", 2)
    scores = IndependentScores(side=SIDE, likeness_side=64)
    for red in (0.1, 0.2, 0.3):
        scores.score(exhibits(flat(red, 0.5, 0.5)))
    assert len(scores._likenesses) == 2


def test_rows_are_strangers(pretend: list[str]) -> None:
    pictures = [flat(0.3, 0.5, 0.1), flat(0.9, 0.1, 0.3), flat(0.5, 0.5, 0.5)]
    scores = IndependentScores(side=SIDE)
    together = scores.score(exhibits(*pictures))
    for k, picture in enumerate(pictures):
        (alone,) = scores.score(exhibits(picture))
        for name in ("result", "look", "expression"):
            one, other = flatten(alone[name]), flatten(together[k][name])
            assert one == pytest.approx(other, rel=1e-5, abs=1e-7)


def test_failures_are_named(pretend: list[str]) -> None:
    blue, fine = flat(0.8, 0.0, 1.0), flat(0.8, 0.0, 0.4)
    scores = IndependentScores(side=SIDE, failed_nme=0.1)
    lost, far = scores.score(exhibits(blue, fine))
    assert (lost["failed"], lost["failure"]) == (True, "no face found")
    assert far["failed"] and far["failure"].endswith("above 0.1 %")


def test_a_network_that_was_optimised_is_no_judge(pretend: list[str]) -> None:
    vgg = str(store.find_entry("stlpips_vgg").sha256)
    alex = str(store.find_entry("stlpips_alex").sha256)
    scores = IndependentScores(side=SIDE, perceptual=("stlpips_vgg", "stlpips_alex"))
    picture = exhibits(flat(0.5, 0.5, 0.1))
    assert scores.score(picture, {vgg})[0]["judges"]["perceptual"] == "stlpips_alex"
    assert scores.score(picture, {alex})[0]["judges"]["perceptual"] == "stlpips_vgg"
    (row,) = scores.score(picture, {alex, vgg})
    assert "perceptual" not in row["judges"] and "lpips" not in row["result"]
    assert pretend == ["stlpips_alex", "stlpips_vgg"]


def test_missing_judges_are_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def miss(*_: object) -> None:
        raise LmexpError("weights x: no network; connect")

    monkeypatch.setattr(independent, "DlibJudge", miss)
    monkeypatch.setattr(independent, "load_network", miss)
    scores = IndependentScores(side=SIDE, fans=())
    samples = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    ws = samples[:3][None]
    for _ in range(2):
        (row,) = scores.score(exhibits(flat(0, 0, 0), ws=ws, samples=samples))
    assert set(row) == {"result", "look", "expression", "judges"}
    assert set(row["result"]) == {"manifold"} and row["look"] == {}
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("scores: identity, landmarks and openings left out (weights x: no")
    assert command.describe(row) == "identity and landmarks not measured"


def test_distance_from_the_manifold_is_the_priors(pretend: list[str]) -> None:
    samples = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    far = 9 * samples[:3][None]
    (row,) = IndependentScores(side=SIDE).score(
        exhibits(
            flat(0.5, 0.5, 0.1),
            inversion=flat(0.5, 0.5, 0.1)[None],
            ws=far,
            inversion_ws=samples[:3][None],
            samples=samples,
        )
    )
    space = GaussianSpace.measure(samples, 1e-4)
    assert row["result"]["manifold"] == pytest.approx(float(space.standardise(far).square().mean()))
    assert row["inversion"]["manifold"] < 5 < row["result"]["manifold"]


def test_a_fault_of_the_scores_costs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def score(self, *_: object) -> list[dict[str, Any]]:
            raise RuntimeError("no\nmemory")

    caplog.set_level(logging.WARNING)
    row = report_scores(Broken(), exhibits(flat(0, 0, 0)), optimised=(), label="a+b")
    assert row == {}
    assert caplog.messages == ["a+b: scores left out (no memory)"]


def test_none_measures_nothing() -> None:
    assert isinstance(NoScores(), Scores) and isinstance(IndependentScores(), Scores)
    assert NoScores().score(exhibits(flat(0, 0, 0), flat(1, 1, 1))) == [{}, {}]


# -- runs that are already there ----------------------------------------------------------------


class Counting:
    """Scores that say what they were shown."""

    def score(self, shown: Exhibits, optimised: object = ()) -> list[dict[str, Any]]:
        assert shown.ws is not None and shown.samples is not None
        return [
            {
                "sides": [shown.result.shape[-1], shown.look.shape[-1]],
                "inverted": shown.inversion is not None,
                "ws": list(shown.ws.shape),
                "samples": len(shown.samples),
            }
        ]


CONFIG = {
    "generator": {
        "_target_": "lmexp.generators.tiny_random.TinyRandom",
        "resolution": 32,
        "dim": 8,
        "channels": 4,
        "seed": 0,
    },
    "latent": {"samples": 50, "samples_seed": 1},
}


def test_a_finished_run_is_scored_from_its_folder(tmp_path: Path) -> None:
    record_run(tmp_path / "a", side=64, steps=2, config=CONFIG, video_frames=0)
    folder = RunFolder(tmp_path / "a")
    before = folder.read_summary()
    rescorer = Rescorer(Counting())
    expected = {"sides": [64, 64], "inverted": False, "ws": [1, 4, 8], "samples": 50}
    assert rescorer.rescore(folder) == expected
    assert folder.read_summary() == {**before, "scores": expected}
    folder.write_picture("inversion", folder.read_picture("proj"))
    folder.write_inversion(np.zeros((1, 4, 8), dtype=np.float32))
    assert rescorer.rescore(folder)["inverted"] is True


def test_what_is_not_finished_is_not_scored(tmp_path: Path) -> None:
    record_run(tmp_path / "a", side=64, steps=4, stop_after=1, video_frames=0)
    with pytest.raises(LmexpError, match=r"a: running .*; only finished runs can be scored"):
        Rescorer(Counting()).rescore(RunFolder(tmp_path / "a"))
    with pytest.raises(LmexpError, match="b: no run here; only finished"):
        Rescorer(Counting()).rescore(RunFolder(tmp_path / "b"))
    with pytest.raises(LmexpError, match="no runs here"):
        find_runs(tmp_path / "nowhere")


def test_the_command_scores_a_folder_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fixed:
        def score(self, *_: object) -> list[dict[str, Any]]:
            return [run_scores(0.4, 0.1, "no face found")]

    monkeypatch.setattr(command, "build_scores", Fixed)
    for name in ("a", "b"):
        record_run(tmp_path / name, side=64, steps=2, config=CONFIG, video_frames=0)
    record_run(tmp_path / "c", side=64, steps=4, stop_after=1, video_frames=0)
    assert command.main([str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a: identity 0.400 (80% kept), leak 0.100, mouth NME 5.00 %")
    assert said.endswith("FAILED: no face found\n")
    assert command.main([str(tmp_path), "--missing"]) == 2  # c is not finished
    out, err = capsys.readouterr()
    assert out.startswith("b: ") and "a: " not in out
    assert err.startswith("lmexp: ") and err.count("\n") == 1
    assert command.main([str(tmp_path / "nowhere")]) == 2


def test_scores_are_chosen_by_name() -> None:
    assert isinstance(command.build_scores(), IndependentScores)
    assert isinstance(command.build_scores("none"), NoScores)
    faces = command.build_scores("faces")
    assert isinstance(faces, IndependentScores) and faces.perceptual == ()
    choices = "scores x: no such choice; choices: faces, independent, none"
    with pytest.raises(LmexpError, match=choices):
        command.build_scores("x")
    assert (conf_folder() / "scores" / "none.yaml").is_file()


# -- tables -------------------------------------------------------------------------------------


def test_table_takes_ratios_of_means_and_counts_failures() -> None:
    lost = run_scores(0.1, 0.3, "no face found")
    rows = tabulate(
        [
            ScoredRun("a", "p", run_scores(0.5, 0.1)),
            ScoredRun("a", "q", run_scores(0.3, 0.2)),
            ScoredRun("b", "p", lost),
            ScoredRun("b", "q", reason="stopped being finite"),
        ]
    )
    look, inverted, expression, a, b = rows
    assert [row.name for row in rows[:3] if row.baseline] == [
        "look unchanged",
        "look inverted",
        "expression photo itself",
    ]
    assert (a.pairs, a.asked, a.failures) == (2, 2, 0)
    assert a.means["identity_cosine"] == pytest.approx(0.4)
    assert a.identity_kept == pytest.approx(0.8)
    assert a.shares["mouth_error"] == pytest.approx(0.3 / 0.8)
    assert (b.pairs, b.asked, b.failures) == (1, 2, 2)
    assert b.identity_kept == pytest.approx(0.2)
    assert look.identity_kept == pytest.approx(2) and inverted.identity_kept == pytest.approx(1)
    assert expression.shares["mouth_error"] == 0
    text = write_markdown(rows)
    assert "| a | 2 | 0 of 2 | 0.400 (80%) |" in text
    assert "| b | 1 | 2 of 2 | 0.100 (20%) |" in text
    assert "| *look unchanged* | 2 | – | 1.000 (200%) |" in text


def test_a_recipe_without_an_inversion_is_held_against_the_others() -> None:
    scores = run_scores(0.25, 0.1)
    del scores["inversion"]
    *_, mean = tabulate([ScoredRun("a", "p", run_scores(0.5, 0.1)), ScoredRun("b", "p", scores)])
    assert mean.identity_kept == pytest.approx(0.5)
    (alone,) = [row for row in tabulate([ScoredRun("b", "p", scores)]) if not row.baseline]
    assert alone.identity_kept is None
    (nothing,) = tabulate([ScoredRun("c", "p")])
    assert (nothing.pairs, nothing.means) == (0, {})


def test_identity_is_held_against_the_named_recipes_inversions() -> None:
    plain, better = run_scores(0.3, 0.1), run_scores(0.6, 0.1)
    better["inversion"]["identity_cosine"] = 0.8
    runs = [ScoredRun("better", "p", better), ScoredRun("plain", "p", plain)]
    first, *_ = [row for row in tabulate(runs) if not row.baseline]
    assert first.identity_kept == pytest.approx(0.75)
    first, *_ = [row for row in tabulate(runs, "plain") if not row.baseline]
    assert first.identity_kept == pytest.approx(1.2)


def test_intervals_are_the_percentile_bootstraps() -> None:
    random = np.random.default_rng(3)
    pairs = [f"{k}" for k in range(20)]
    errors = {name: random.gamma(2, 0.05, len(pairs)).tolist() for name in "ab"}
    runs = [
        ScoredRun(name, pair, run_scores(0.5, error))
        for name, values in errors.items()
        for pair, error in zip(pairs, values, strict=True)
    ]
    a, b = [row for row in tabulate(runs) if not row.baseline]
    look = run_scores(0.5, 0.1)["look"]["mouth_error"]

    def expect(values: list[float]) -> Any:
        # An implementation of its own, with draws of its own.
        found = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=20000, method="percentile", rng=1
        )
        return found.confidence_interval

    wanted = expect([error / look for error in errors["b"]])
    assert b.intervals["mouth_error"] == pytest.approx(tuple(wanted), rel=0.03)
    differences = [y - x for x, y in zip(errors["a"], errors["b"], strict=True)]
    mean, low, high = b.differences["mouth_error"]
    assert mean == pytest.approx(np.mean(differences))
    assert (low, high) == pytest.approx(tuple(expect(differences)), abs=0.003)
    assert not a.differences and a.intervals["identity_cosine"] == pytest.approx((1, 1))
    text = write_markdown([a, b])
    assert "Less `a` on the same pairs" in text
    assert ("**" in text.splitlines()[-2]) == (low > 0 or high < 0)


def test_a_difference_that_luck_does_not_explain_is_bold() -> None:
    runs = [
        ScoredRun(name, f"{k}", run_scores(0.5, error + 0.001 * k))
        for name, error in (("a", 0.1), ("b", 0.2))
        for k in range(8)
    ]
    text = write_markdown(tabulate(runs))
    assert "**+0.100 (+0.100 to +0.100)**" in text


# -- dlib itself --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dlib_judge() -> DlibJudge:
    files = store.cache_folder() / "files"
    if not list(files.glob("shape_predictor_68*")):
        pytest.skip("dlib's networks are not in the cache: python -m lmexp.weights fetch them")
    return DlibJudge()


def test_dlib_knows_a_face_and_its_owner(dlib_judge: DlibJudge) -> None:
    plain, turned = (np.asarray(astronaut(256, turn=turn)) for turn in (0, 5))
    one, other = dlib_judge.look_at(plain), dlib_judge.look_at(turned)
    assert one.found and other.found
    assert np.linalg.norm(one.identity - other.identity) < 0.4
    # Where the made-up landmarks of `astronaut` lie, to an eye's width.
    made_up = face_landmarks(256).numpy()
    assert np.abs(one.landmarks[36:48].mean(0) - made_up[36:48].mean(0)).max() < 10
    assert dlib_judge.look_at(plain) is one


def test_dlib_sees_no_face_in_noise(dlib_judge: DlibJudge) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    verdict = dlib_judge.look_at(noise)
    assert not verdict.found
    assert verdict.landmarks.shape == (68, 2) and verdict.identity.shape == (128,)


def test_dlib_in_the_scores(dlib_judge: DlibJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(independent, "DlibJudge", lambda: dlib_judge)
    monkeypatch.setattr(independent, "load_network", lambda name: PretendNetwork())
    look, expression = (image_tensor(astronaut(256, turn=turn))[None] for turn in (0, 10))
    blurred = image_tensor(astronaut(256, blur=4))[None]
    points = face_landmarks(256)[None]
    (row,) = IndependentScores().score(Exhibits(blurred, look, expression, points, points))
    assert 0.3 < row["result"]["identity_cosine"] < 0.99
    assert row["look"]["nme"]["all"] > 8 > 4 > row["look"]["nme_aligned"]["all"]
    assert not row["failed"]
