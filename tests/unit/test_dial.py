"""The dial: its two ends are the inversion and the result, and regions and layers stay apart."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from recorded_runs import face_landmarks, record_run, write_index

from lmexp.dial import Dial, Ends, main, turn
from lmexp.errors import LmexpError
from lmexp.generators.tiny_random import TinyRandom
from lmexp.recording.images import to_picture
from lmexp.recording.run_folder import RunFolder

SIDE = 64
GENERATOR = {"resolution": SIDE, "dim": 8, "channels": 4, "seed": 0}


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    noise -= noise.mean()
    return noise * noise.square().mean().rsqrt()


@pytest.fixture(scope="module")
def generator() -> TinyRandom:
    return TinyRandom(**GENERATOR)


@pytest.fixture
def ends(generator: TinyRandom) -> Ends:
    shapes = generator.noise_shapes
    return Ends(
        ws=(normal((1, generator.num_ws, 8), 1), normal((1, generator.num_ws, 8), 2)),
        noise_bufs=tuple(
            (normal((1, 1, *shape), 3 + k), normal((1, 1, *shape), 30 + k))
            for k, shape in enumerate(shapes)
        ),
        landmarks=(face_landmarks(SIDE)[None], face_landmarks(SIDE, smile=1.0)[None]),
    )


@pytest.fixture
def run(tmp_path: Path, ends: Ends) -> Path:
    config = {
        "generator": {"_target_": "lmexp.generators.tiny_random.TinyRandom", **GENERATOR},
        "optimizer": {"steps": 2},
    }
    folder = RunFolder(tmp_path / "run")
    record_run(folder.path, side=SIDE, steps=2, config=config, video_frames=0)
    for write, k in ((folder.write_inversion, 0), (folder.write_projection, 1)):
        write(ends.ws[k].numpy(), [pair[k][0].numpy() for pair in ends.noise_bufs])
    return folder.path


@pytest.mark.parametrize("k", [0, 1])
def test_its_ends_are_the_inversion_and_the_result(
    generator: TinyRandom, ends: Ends, k: int
) -> None:
    with torch.no_grad():
        expected = generator.synthesis(ends.ws[k], [pair[k] for pair in ends.noise_bufs])[0]
    torch.testing.assert_close(Dial(generator, ends).at(k), expected, atol=1e-5, rtol=1e-5)


def test_latents_go_on_straight_and_noise_stays_noise(
    generator: TinyRandom, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    real = generator.synthesis

    def synthesis(ws: torch.Tensor, noise: list[torch.Tensor]) -> torch.Tensor:
        seen.append((ws, list(noise)))
        return real(ws, noise)

    monkeypatch.setattr(generator, "synthesis", synthesis)
    dial = Dial(generator, ends)
    for strength in (0.5, 1.5):
        dial.at(strength)
        ws, noise = seen[-1]
        start, end = ends.ws
        torch.testing.assert_close(ws, start + strength * (end - start))
        for buf in noise:
            assert buf.mean().item() == pytest.approx(0, abs=1e-5)
            assert buf.square().mean().item() == pytest.approx(1, abs=1e-4)


def test_layers_outside_the_range_stay_the_inversions(
    generator: TinyRandom, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = generator.synthesis
    monkeypatch.setattr(
        generator, "synthesis", lambda ws, noise: seen.append(ws) or real(ws, noise)
    )
    Dial(generator, ends, layers=(1, 2)).at(0.8)
    moved = (seen[-1] != ends.ws[0]).any(-1)[0]
    assert moved.tolist() == [1 <= layer <= 2 for layer in range(generator.num_ws)]
    for layers in ((2, 1), (0, generator.num_ws), (-1, 2)):
        with pytest.raises(LmexpError, match=f"layers are 0 … {generator.num_ws - 1}"):
            Dial(generator, ends, layers=layers)


def test_regions_move_alone(generator: TinyRandom, ends: Ends) -> None:
    still, moved = Dial(generator, ends).at(0), Dial(generator, ends).at(1.2)
    image = Dial(generator, ends, regions=("mouth",)).at(1.2)
    x, y = ends.landmarks[0][0, 48:].mean(0).long().tolist()
    torch.testing.assert_close(image[:, y, x], moved[:, y, x], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(image[:, :8], still[:, :8], atol=1e-4, rtol=1e-4)
    assert (still[:, y, x] - moved[:, y, x]).abs().max() > 1e-3


def test_a_run_is_turned_into_pictures_and_a_video(
    run: Path, ends: Ends, generator: TinyRandom, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--strengths", "0", "1", "1.5", "--frames", "5"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in written] == [
        "strength_0.00.png",
        "strength_1.00.png",
        "strength_1.50.png",
        "strip.png",
        "dial.mp4",
    ]
    out = RunFolder(run / "dial")
    expected = to_picture(Dial(generator, ends).at(1.5)).astype(int)
    assert np.abs(out.read_picture("strength_1.50") - expected).max() <= 1
    assert out.read_picture("strip").shape[1] >= 3 * SIDE
    with av.open(str(written[-1])) as video:
        assert video.streams.video[0].codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 10 + 15
    assert np.abs(frames[0].astype(int) - frames[4]).mean() > 1


def test_each_choice_has_a_folder_of_its_own(run: Path) -> None:
    written = turn(run, strengths=(1.0,), regions=("eyes", "brows"), layers=(0, 3), frames=0)
    assert {path.parent.name for path in written} == {"dial_eyes_brows_layers0to3"}
    assert {path.name for path in written} == {"strength_1.00.png", "strip.png"}


def test_runs_without_two_ends_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "inversion_w.npz").unlink()
    record_run(tmp_path / "half", side=SIDE, steps=4, stop_after=1, video_frames=0)
    for folder, reason in (
        (run, "no inversion in it, so there is no strength 0; run the job with latent.start="),
        (tmp_path / "half", "the dial needs a finished run"),
        (tmp_path / "none", "no run here; the dial needs a finished run"),
    ):
        assert main([str(folder)]) == 2
        said = capsys.readouterr().err
        assert reason in said and said.count("\n") == 1


def test_of_a_sweep_its_finished_jobs_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, steps in (("a b", None), ("c", None), ("half", 1)):
        record_run(tmp_path / name, stop_after=steps, video_frames=0)
    jobs = [
        {"folder": name, "label": f"seed={k}", "overrides": {"seed": k}}
        for k, name in enumerate(("a b", "c", "half"))
    ]
    write_index(tmp_path, jobs)
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"lmexp: {tmp_path}: a sweep; the dial needs one of its finished jobs:",
        f"  '{tmp_path}/a b'  seed=0",
        f"  {tmp_path}/c  seed=1",
    ]
    write_index(tmp_path, jobs[2:])
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no finished run" in said and said.count("\n") == 1
