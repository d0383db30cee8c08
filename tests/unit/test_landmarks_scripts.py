"""The training script learns, mirrors rightly and ends on time; the evaluation reads its file."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from lmexp.landmarks.decoding import decode
from lmexp.landmarks.framing import place, resample
from lmexp.landmarks.groups import FLIP, GROUPS
from lmexp.landmarks.pts import write_pts

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return script("train_landmarks")


def mean_face(side: int = 96) -> Tensor:
    """[68, 2], px: a schematic face, symmetric about the middle of a picture of that side."""
    angle = torch.linspace(0, math.pi, 17)
    jaw = torch.stack((-torch.cos(angle), torch.sin(angle) * 1.1), dim=1)
    brow = torch.stack((torch.linspace(-0.8, -0.2, 5), torch.full((5,), -0.4)), dim=1)
    bridge = torch.stack((torch.zeros(4), torch.linspace(-0.2, 0.25, 4)), dim=1)
    nose = torch.stack((torch.linspace(-0.2, 0.2, 5), torch.full((5,), 0.35)), dim=1)
    eye = torch.tensor([[-0.65, -0.2], [-0.5, -0.3], [-0.4, -0.3], [-0.25, -0.2], [-0.4, -0.1],
                        [-0.5, -0.1]])  # fmt: skip
    outer = torch.tensor([[math.cos(a), math.sin(a)] for a in
                          [math.pi + k * math.pi / 6 for k in range(12)]])  # fmt: skip
    inner = torch.tensor([[math.cos(a), math.sin(a)] for a in
                          [math.pi + k * math.pi / 4 for k in range(8)]])  # fmt: skip
    low = torch.tensor([0.0, 0.65])
    mirror = torch.tensor([-1.0, 1.0])
    right_eye = (eye * mirror)[[3, 2, 1, 0, 5, 4]]
    points = torch.cat(
        (
            *(jaw, brow, (brow * mirror).flip(0), bridge, nose, eye, right_eye),
            outer * torch.tensor([0.4, 0.2]) + low,
            inner * torch.tensor([0.3, 0.1]) + low,
        )
    )
    return points * 0.22 * side + side / 2


def test_schematic_face_is_its_own_mirror_image() -> None:
    face = mean_face()
    mirrored = torch.stack((96 - face[:, 0], face[:, 1]), dim=1)[list(FLIP)]
    torch.testing.assert_close(mirrored, face, atol=1e-3, rtol=0)


def test_drawn_points_lie_on_the_drawn_pixels(training: ModuleType) -> None:
    """A blob in one eye's colour is still at that eye's points after turning and mirroring."""
    face = mean_face()
    images = torch.zeros(16, 3, 96, 96, dtype=torch.uint8)
    yy, xx = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    centres = face[36:42].mean(dim=0), face[42:48].mean(dim=0)
    for channel, centre in enumerate(centres):
        blob = torch.exp(-((xx - centre[0]) ** 2 + (yy - centre[1]) ** 2) / 8)
        images[:, channel] = (255 * blob).to(torch.uint8)
    landmarks = face.expand(16, 68, 2)
    augmentation = training.Augmentation(torch.device("cpu"), 0)
    views, flipped = augmentation.views(landmarks)
    assert 0 < flipped.sum() < 16
    shown = resample(images.float(), views, 256)
    points = place(landmarks, views, 256)
    for row in range(16):
        for channel, group in enumerate(("left_eye", "right_eye")):
            blob = shown[row, channel]
            if blob.max() < 200:
                continue
            at = blob.argmax()
            members = GROUPS[group]
            middle = points[row, members.start : members.stop].mean(dim=0)
            assert (torch.tensor([at % 256 + 0.5, at // 256 + 0.5]) - middle).norm() < 4


def test_mirrored_views_swap_left_and_right_landmarks(training: ModuleType) -> None:
    augmentation = training.Augmentation(torch.device("cpu"), 1)
    landmarks = mean_face().expand(64, 68, 2)
    images, points = augmentation.draw(torch.zeros(64, 3, 96, 96, dtype=torch.uint8), landmarks)
    assert images.shape == (64, 3, 256, 256)
    assert images.min() >= -1 and images.max() <= 1
    # Whatever was done to it, a face's left eye is on the viewer's left and it isn't mirrored.
    across = points[:, 45] - points[:, 36]
    down = points[:, 8] - points[:, 27]
    assert (across[:, 0] > 0).all()
    assert (across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0] > 0).all()


def test_perfect_maps_have_no_loss_and_decode_to_their_points(training: ModuleType) -> None:
    points = 40 + 170 * torch.rand(2, 68, 2, generator=torch.Generator().manual_seed(0))
    maps = training.gaussian_maps(points, training.SIGMA)
    square, point = training.losses(maps, points)
    assert square == 0
    assert point < 0.03  # cells
    assert (decode(maps, 256) - points).norm(dim=2).max() < 0.4
    worse, further = training.losses(maps.roll(1, dims=3), points)
    assert worse > 1
    assert 0.8 < further < 1.1


def test_rare_expressions_are_shown_more_often(training: ModuleType) -> None:
    faces = mean_face().repeat(3, 1, 1)
    faces[1, 61:64, 1] -= 10  # the inner lips part
    faces[2, [37, 38], 1] = faces[2, [41, 40], 1]  # an eye closes
    assert training.sampling_weights(faces).tolist() == [1.0, 3.0, 3.0]


def test_learning_rate_warms_up_and_ends_at_zero(training: ModuleType) -> None:
    rates = [training.learning_rate(k / 100, 1e-3) for k in range(101)]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1e-3, rel=0.01)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_command_writes_a_file_that_the_evaluation_reads(
    training: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for k in range(2):
            pixels = random.integers(0, 255, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"{k}.jpg")
            write_pts(tmp_path / part / f"{k}.pts", mean_face())
    out = tmp_path / "out" / "fan.safetensors"
    arguments = ["--data", str(tmp_path), "--out", str(out), "--width", "16", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--minutes", "0", "--device", "cpu"])
    training.main()
    trained = capsys.readouterr().out
    report = json.loads(trained[trained.index("{\n") :])
    with safe_open(out, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        assert file.get_tensor("stem.weight").dtype == torch.float16
        assert file.get_tensor("stem_norm.running_mean").dtype == torch.float32
    assert metadata == report
    assert metadata["finished"] and metadata["steps"] >= 1
    assert list(out.parent.iterdir()) == [out]

    arguments = ["--data", str(tmp_path / "val"), "--weights", str(out)]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    script("evaluate_landmarks").main()
    told = capsys.readouterr()
    found = json.loads(told.out)
    for framing in ("tight", "ffhq"):
        assert found[framing]["nme"] == pytest.approx(metadata["val"][framing]["nme"], abs=0.01)
    assert "inner_lip" in told.err

    monkeypatch.setattr(sys, "argv", ["evaluate", "--data", str(tmp_path), "--weights", str(out)])
    with pytest.raises(SystemExit, match=r"no \.pts file"):
        script("evaluate_landmarks").main()
