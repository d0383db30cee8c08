"""Views show what they say they show, and points go where the pixels go."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.landmarks.framing import (
    ffhq_views,
    place,
    read_faces,
    resample,
    square_views,
    tight_views,
)
from lmexp.landmarks.pts import write_pts
from lmexp.landmarks.score import score


def upright_face() -> Tensor:
    """[1, 68, 2]: eyes 40 px apart at y = 100, mouth corners at y = 150, all else between."""
    face = torch.full((1, 68, 2), 120.0)
    face[:, 36:42] = torch.tensor([100.0, 100.0])
    face[:, 42:48] = torch.tensor([140.0, 100.0])
    face[:, 48] = torch.tensor([105.0, 150.0])
    face[:, 54] = torch.tensor([135.0, 150.0])
    return face


def test_tight_view_is_centred_on_the_box() -> None:
    face = torch.tensor([[[100.0, 80.0], [180.0, 100.0]]])
    # Box 80 × 20 around (140, 90): a side of 100 px is filled to 0.8.
    assert tight_views(face)[0].tolist() == [[100.0, 0.0, 90.0], [0.0, 100.0, 40.0]]


def test_ffhq_view_worked_by_hand() -> None:
    # x' = (40, 0) + (50, 0); side = 2 · max(2 · 40, 1.8 · 50) = 180; centre (120, 100 + 5).
    expected = torch.tensor([[180.0, 0.0, 30.0], [0.0, 180.0, 15.0]])
    torch.testing.assert_close(ffhq_views(upright_face())[0], expected)


@pytest.mark.parametrize("degrees", [-70.0, 25.0, 180.0])
def test_ffhq_view_turns_with_the_face(degrees: float) -> None:
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    face = upright_face()
    turned = face @ turn.T
    torch.testing.assert_close(
        place(turned, ffhq_views(turned), 256),
        place(face, ffhq_views(face), 256),
        atol=1e-3,
        rtol=0,
    )


def test_identity_view_changes_nothing() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    views = square_views(torch.full((2, 2), 16.0), torch.tensor([[32.0, 0.0]]).expand(2, 2))
    torch.testing.assert_close(resample(images, views, 32), images, atol=1e-5, rtol=0)
    points = torch.tensor([[[0.0, 0.0], [7.0, 30.0]]]).expand(2, 2, 2)
    torch.testing.assert_close(place(points, views, 32), points)


def test_points_follow_the_pixels() -> None:
    yy, xx = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    spot = torch.tensor([[[40.0, 22.0]]])
    image = torch.exp(-((xx - 40) ** 2 + (yy - 22) ** 2) / 18).expand(1, 3, 64, 64)
    views = square_views(torch.tensor([[30.0, 30.0]]), torch.tensor([[40.0, 15.0]]))
    shown = resample(image, views, 96)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    centre = torch.stack(((shown * columns).sum(), (shown * rows).sum())) / shown.sum()
    torch.testing.assert_close(centre, place(spot, views, 96)[0, 0], atol=0.1, rtol=0)


def write_face(folder: Path, name: str, side: int = 8) -> None:
    pixels = np.full((side, side, 3), (200, 100, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    write_pts(folder / f"{name}.pts", torch.arange(136.0).reshape(68, 2))


def test_faces_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_face(tmp_path, "b")
    write_face(tmp_path, "a")
    write_pts(tmp_path / "a.pts", torch.zeros(68, 2))
    images, landmarks = read_faces(tmp_path)
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 8, 8)
    assert images[0, :, 0, 0].tolist() == [200, 100, 50]
    assert landmarks[0].tolist() == [[0.0, 0.0]] * 68
    assert landmarks[1, 67].tolist() == [134.0, 135.0]


def test_reading_faults_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(LmexpError, match=r"no \.pts file"):
        read_faces(tmp_path)
    write_face(tmp_path, "a")
    write_face(tmp_path, "b", side=9)
    with pytest.raises(LmexpError, match=r"b\.png: its size differs"):
        read_faces(tmp_path)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(LmexpError, match=r"b\.png: not a readable picture"):
        read_faces(tmp_path)
    (tmp_path / "b.png").unlink()
    with pytest.raises(LmexpError, match=r"b\.pts: no picture beside it"):
        read_faces(tmp_path)


def test_score_worked_by_hand() -> None:
    reference = torch.zeros(2, 68, 2)
    reference[:, 45, 0] = 100.0  # outer eye corners 100 px apart
    found = reference.clone()
    found[0, :17, 0] += 34.0  # a quarter of the landmarks of face 0, 34 % each
    found[1, :, 1] += 12.0
    result = score(found, reference)
    assert result.faces == 2
    assert result.nme == pytest.approx((34 / 4 + 12) / 2)
    assert result.median == pytest.approx((34 / 4 + 12) / 2)
    assert result.failures == 1
    assert result.groups["jaw"] == pytest.approx((34 + 12) / 2)
    assert result.groups["inner_lip"] == pytest.approx(6)
    assert result.bias == pytest.approx((34 / 8, 6))
    assert result.as_dict()["bias"] == [4.25, 6.0]
    assert result.as_dict()["nme"] == 10.25
