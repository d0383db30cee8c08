"""The training script learns, mirrors rightly and ends on time; the evaluation reads its file.

Warped faces show their lips and lids where the moved points say.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from lmexp.landmarks.decoding import decode
from lmexp.landmarks.framing import place, resample
from lmexp.landmarks.groups import FLIP, GROUPS
from lmexp.landmarks.pts import write_pts
from lmexp.landmarks.score import score
from lmexp.metrics import dlib_judge
from lmexp.metrics.aspect_ratios import eye_aspect_ratio, mouth_aspect_ratio

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def siblings() -> Iterator[None]:
    """As if run from the scripts' folder, where they import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.fixture(scope="module")
def training(siblings: None) -> ModuleType:
    return script("train_landmarks")


@pytest.fixture(scope="module")
def warps(siblings: None) -> ModuleType:
    return importlib.import_module("landmark_warps")


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
    landmarks = mean_face().expand(32, 68, 2)
    images, points = augmentation.draw(torch.zeros(32, 3, 96, 96, dtype=torch.uint8), landmarks)
    assert images.shape == (32, 3, 256, 256)
    assert images.min() >= -1 and images.max() <= 1
    # Whatever was done to it, a face's left eye is on the viewer's left and it isn't mirrored.
    across = points[:, 45] - points[:, 36]
    down = points[:, 8] - points[:, 27]
    assert (across[:, 0] > 0).all()
    assert (across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0] > 0).all()


def test_perfect_maps_have_no_loss_and_decode_to_their_points(training: ModuleType) -> None:
    points = 40 + 170 * torch.rand(2, 68, 2, generator=torch.Generator().manual_seed(0))
    maps = training.gaussian_maps(points, training.SIGMA)
    square, point, opening = training.losses(maps, points)
    assert square == 0
    assert point < 0.03 and opening < 0.03  # cells
    assert (decode(maps, 256) - points).norm(dim=2).max() < 0.4
    worse, further, opening = training.losses(maps.roll(1, dims=3), points)
    assert worse > 1
    assert 0.8 < further < 1.1
    assert opening < 0.1  # both lips are a cell too far to the right


def test_openings_are_wrong_where_one_lip_is(training: ModuleType) -> None:
    points = 60 + 130 * torch.rand(1, 68, 2, generator=torch.Generator().manual_seed(1))
    wrong = points.clone()
    wrong[:, [67, 66, 65], 1] += 4  # px of the input: one cell
    maps = training.gaussian_maps(wrong, training.SIGMA)
    opening = training.losses(maps, points)[2]
    assert opening == pytest.approx(3 / 7, abs=0.06)  # three of the seven pairs, a cell each


@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_wider_maps_count_as_much(training: ModuleType, sigma: float) -> None:
    points = 60 + 130 * torch.rand(1, 68, 2, generator=torch.Generator().manual_seed(1))
    square, point, _ = training.losses(training.gaussian_maps(points, sigma), points, sigma)
    assert square == 0
    assert point < 0.05
    blank = torch.zeros(1, 68, 64, 64)
    usual = training.losses(blank, points)[0]
    assert training.losses(blank, points, sigma)[0] == pytest.approx(float(usual), rel=0.03)


def test_eyes_and_lips_count_more_than_the_jaw(training: ModuleType) -> None:
    points = 60 + 130 * torch.rand(1, 68, 2, generator=torch.Generator().manual_seed(1))
    maps = training.gaussian_maps(points, training.SIGMA)
    costs = {}
    for point in (8, 37, 62):
        less = maps.clone()
        less[:, point] = 0
        costs[point] = float(training.losses(less, points)[0])
    assert costs[37] == pytest.approx(3 * costs[8], rel=0.02)
    assert costs[62] == pytest.approx(3.2 * costs[8], rel=0.02)
    assert sum(training.GROUP_WEIGHTS) == pytest.approx(68)


def face_of(side: int = 256, rows: int = 1) -> Tensor:
    return mean_face(side).expand(rows, 68, 2).clone()


def marked(points: Tensor, chosen: list[int], side: int = 256) -> Tensor:
    """[N, 1, side, side]: a blob on each of the chosen points."""
    at = torch.arange(side) + 0.5
    bells = torch.exp(-((at - points[:, chosen][..., None]) ** 2) / 8)
    return (bells[:, :, 1, :, None] * bells[:, :, 0, None, :]).amax(dim=1, keepdim=True)


def test_mouths_open_and_shut_to_the_ratio(warps: ModuleType) -> None:
    face = face_of(rows=3)
    none, one = torch.zeros(3), torch.ones(3)
    ratio = torch.tensor([1.0, 0.05, float(mouth_aspect_ratio(face)[0])])
    moved = warps.move_mouth(face, ratio, 0.8 * one, 0.5 * one, none)
    torch.testing.assert_close(mouth_aspect_ratio(moved), ratio, atol=1e-3, rtol=0)
    torch.testing.assert_close(moved[2], face[2], atol=1e-3, rtol=0)
    upper_face = [*range(17, 48), 0, 1, 2, 14, 15, 16]
    assert torch.equal(moved[:, upper_face], face[:, upper_face])
    way = moved - face
    assert way[0, 66, 1] > 0 > way[0, 62, 1]  # the lower lip sinks, the upper one rises a little
    assert way[0, 66, 1] == pytest.approx(-4 * float(way[0, 62, 1]), rel=1e-3)
    assert way[0, 8, 1] == pytest.approx(0.5 * float(way[0, 66, 1]), rel=1e-3)
    assert way[1, 66, 1] < 0 < way[1, 62, 1]
    wide = warps.move_mouth(face, ratio, one, one, 0.1 * one)
    width = (wide[0, 64] - wide[0, 60]).norm() / (face[0, 64] - face[0, 60]).norm()
    assert width == pytest.approx(1.2, rel=1e-3)


def test_lids_and_brows_go_where_told(warps: ModuleType) -> None:
    face = face_of(rows=2)
    factor = torch.tensor([[0.2, 0.2], [0.2, 1.0]])
    moved = warps.move_lids(face, factor, torch.ones(2))
    before, after = eye_aspect_ratio(face), eye_aspect_ratio(moved)
    torch.testing.assert_close(after / before, torch.tensor([0.2, 0.6]))
    assert torch.equal(moved[:, [40, 41, 46, 47]], face[:, [40, 41, 46, 47]])
    raised = warps.move_brows(face, torch.tensor([0.1, 0.0]))
    unit = (face[0, 45] - face[0, 36]).norm()
    assert (face - raised)[0, 20].tolist() == pytest.approx([0, 0.1 * float(unit)], abs=1e-4)
    assert torch.equal(raised[1], face[1])


def test_warped_pictures_show_points_where_they_were_moved(warps: ModuleType) -> None:
    face = face_of()
    one = torch.ones(1)
    moved = warps.move_mouth(face, 0.9 * one, 0.8 * one, 0.7 * one, 0.05 * one)
    moved = warps.move_brows(warps.move_lids(moved, 0.3 * torch.ones(1, 2), one), 0.05 * one)
    where = warps.sources(face, moved, 256)
    assert where.shape == (1, 256, 256, 2)
    for point in (8, 20, 37, 41, 44, 51, 57, 62, 66):
        shown = torch.nn.functional.grid_sample(
            marked(face, [point]), where / 128 - 1, align_corners=False
        )
        at = int(shown.argmax())
        found = torch.tensor([at % 256 + 0.5, at // 256 + 0.5])
        # A lid's picture is squeezed to a third: its peak lies on few pixels.
        assert (found - moved[0, point]).norm() < 1.5, point
    still = warps.sources(face, face, 256)
    at = torch.arange(256) + 0.5
    torch.testing.assert_close(still[0, :, :, 0], at.expand(256, 256), atol=1e-3, rtol=0)


def test_borrowed_mouths_fill_the_lips_and_nothing_else(warps: ModuleType) -> None:
    face = face_of()
    donor = face_of(96)
    images = torch.zeros(1, 3, 96, 96)
    images[:, 0] = marked(donor, [60, 61, 62, 63, 64, 65, 66, 67], 96)[:, 0].clamp_min(0.5)
    grey = torch.full((1, 3, 256, 256), 0.5)
    painted, inside = warps.paint_mouths(grey, face, images, donor)
    middle = face[0, 60:68].mean(dim=0).long()
    assert inside[0, 0, middle[1], middle[0]] > 0.99
    assert painted[0, 1, middle[1], middle[0]] < 0.01  # red alone
    assert painted[0, 0, middle[1], middle[0]] > 0.3
    outside = inside[0, 0] < 1e-3
    assert torch.equal(painted[0, :, outside].round(decimals=2), grey[0, :, outside])
    x, y = face[0, 60:68].amin(dim=0), face[0, 60:68].amax(dim=0)
    area = float(inside.sum()) / float((y - x).prod())
    assert 0.5 < area < 0.8  # an octagon of its box, without the soft edge


def test_only_open_mouths_are_lent(warps: ModuleType) -> None:
    faces = face_of(96, 2)
    faces[0] = warps.move_mouth(faces[:1], *torch.tensor([[0.1], [0.5], [0.0], [0.0]]))[0]
    mouths = warps.find_mouths(torch.zeros(2, 3, 96, 96, dtype=torch.uint8), faces)
    assert torch.equal(mouths.landmarks, faces[1:])


def test_training_opens_mouths_and_closes_eyes(training: ModuleType, warps: ModuleType) -> None:
    images = torch.full((24, 3, 96, 96), 128, dtype=torch.uint8)
    landmarks = face_of(96, 24)
    mouths = warps.find_mouths(images, landmarks)
    changing = training.Augmentation(torch.device("cpu"), 5, mouths)
    views, points = changing.draw(images, landmarks)
    assert views.shape == (24, 3, 256, 256) and torch.isfinite(views).all()
    warped = round(24 * training.WARPED)
    mouth, eyes = mouth_aspect_ratio(points), eye_aspect_ratio(points)
    assert mouth[:warped].max() > 0.7 and mouth[:warped].min() < 0.3
    assert eyes[:warped].min() < 0.25
    assert mouth[warped:].std() < 0.05 and eyes[warped:].std() < 0.06  # stretched by views alone
    nobody = training.Augmentation(torch.device("cpu"), 5, warps.Mouths(images[:0], landmarks[:0]))
    assert mouth_aspect_ratio(nobody.draw(images, landmarks)[1]).std() < 0.05


def test_training_lights_some_faces_in_one_colour(training: ModuleType) -> None:
    augmentation = training.Augmentation(torch.device("cpu"), 6)
    lamps = augmentation.lamps(64)[:, :, 0, 0]
    assert (lamps == 1).sum(dim=1).tolist() == [1] * 64
    assert set(lamps.argmax(dim=1).tolist()) == {0, 1, 2}
    dim = lamps[lamps < 1]
    assert 0.16 < dim.min() < 0.25 < dim.max() < 0.45
    seen = augmentation.spoil(torch.full((300, 3, 32, 32), 0.5)).clamp(0, 1).mean(dim=(2, 3))
    light = seen.sort(dim=1).values
    tinted = (light[:, 2] > 2.5 * light[:, 1]) & (light[:, 2] > 0.1)
    assert 2 <= tinted.sum() <= 30


class ByPlace(torch.nn.Module):
    """Finds the left one of a red and a green blob as landmark 0, the right one as 16."""

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.nn.functional.avg_pool2d((images + 1) / 2, 4)
        columns = maps[:, :2].amax(dim=2).argmax(dim=2)
        found = maps[:, :1].repeat(1, 68, 1, 1)
        red_first = (columns[:, 0] < columns[:, 1])[:, None, None]
        found[:, 0] = torch.where(red_first, maps[:, 0], maps[:, 1])
        found[:, 16] = torch.where(red_first, maps[:, 1], maps[:, 0])
        return found


def test_teacher_annotates_through_turned_and_mirrored_views(
    training: ModuleType, tmp_path: Path
) -> None:
    points = torch.tensor([[[60.0, 100.0], [150.0, 120.0]]])
    pixels = torch.zeros(256, 256, 3)
    for channel in range(2):
        pixels[..., channel] = 255 * marked(points, [channel])[0, 0]
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "a.jpg", quality=98)
    images, views = training.read_unlabelled(tmp_path, 320)
    assert images.shape == (1, 3, 320, 320)
    assert views.tolist() == [[[256, 0, 32], [0, 256, 32]]]
    found = training.annotate(ByPlace(), images, views)
    assert found.shape == (1, 68, 2)
    torch.testing.assert_close(found[:, [0, 16]], points + 32, atol=1.0, rtol=0)
    with pytest.raises(SystemExit, match=r"no \.jpg file there"):
        training.read_unlabelled(tmp_path / "none", 320)


def test_openings_are_scored_as_ratios() -> None:
    face = face_of(rows=2)
    found = face.clone()
    found[1, 66, 1] += 0.1 * (face[1, 64, 0] - face[1, 60, 0])
    found[0, [37, 38], 1] = face[0, [41, 40], 1]
    result = score(found, face)
    assert result.mouth_error == pytest.approx(0.05, abs=1e-4)
    assert result.mouth_bias == pytest.approx(0.05, abs=1e-4)
    assert result.eye_error == pytest.approx(0.125, abs=1e-3)  # one of four eyes, 0.5 open
    assert result.eye_bias == pytest.approx(-0.125, abs=1e-3)
    assert result.as_dict()["eye_bias"] == pytest.approx(-0.125, abs=1e-3)


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


def run(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    module.main()


@dataclass
class Judge:
    """Sees the schematic face in every picture but black ones."""

    def look_at(self, picture: NDArray[np.uint8]) -> dlib_judge.Verdict:
        points = mean_face(picture.shape[0]).double().numpy() - 0.5
        return dlib_judge.Verdict(bool(picture.any()), points, np.zeros(128))


def test_commands_train_go_on_and_score(
    training: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "val", "generated"):
        (tmp_path / part).mkdir()
        for k in range(2):
            pixels = random.integers(0, 255, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"{k}.jpg")
            if part != "generated":
                write_pts(tmp_path / part / f"{k}.pts", mean_face())
    Image.new("RGB", (96, 96)).save(tmp_path / "generated" / "nobody.jpg")
    out = tmp_path / "out" / "fan.safetensors"
    common = ("--data", tmp_path, "--width", 16, "--batch", 2, "--minutes", 0, "--device", "cpu")
    run(monkeypatch, training, *common, "--out", out)
    trained = capsys.readouterr().out
    report = json.loads(trained[trained.index("{\n") :])
    with safe_open(out, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        assert file.get_tensor("stem.weight").dtype == torch.float16
        assert file.get_tensor("stem_norm.running_mean").dtype == torch.float32
    assert metadata == report
    assert metadata["finished"] and metadata["steps"] >= 1
    assert metadata["sigma"] == training.SIGMA and not metadata["recipe"]["fine_tuned"]
    assert list(out.parent.iterdir()) == [out]

    scoring = script("evaluate_landmarks")
    monkeypatch.setattr(dlib_judge, "DlibJudge", Judge)
    faces = tmp_path / "generated"
    generated = ("--spoilt", "--every", 1, "--generated", faces, "--keep")
    run(monkeypatch, scoring, "--data", tmp_path / "val", "--weights", out, *generated)
    told = capsys.readouterr()
    found = json.loads(told.out)
    for framing in ("tight", "ffhq"):
        assert found[framing]["nme"] == pytest.approx(metadata["val"][framing]["nme"], abs=0.01)
    assert found["generated"]["faces"] == 2  # the black picture has none
    assert found["open mouth"]["faces"] == 2 and "closed eyes" not in found
    for name in ("mouths opened", "eyes closed", "green light", "studded hat", "quarter covered"):
        assert found[name]["faces"] == 2
        assert name in told.err
    assert "inner_lip" in told.err
    assert [path.name for path in sorted(faces.glob("*.pts"))] == ["0.pts", "1.pts"]
    monkeypatch.setattr(dlib_judge, "DlibJudge", None)  # what it found has been kept
    (faces / "nobody.jpg").unlink()
    run(monkeypatch, scoring, "--data", tmp_path / "val", "--weights", out, "--generated", faces)
    again = json.loads(capsys.readouterr().out)
    assert again["generated"]["nme"] == pytest.approx(found["generated"]["nme"], rel=1e-3)

    more = ("--start", out, "--unlabelled", tmp_path / "generated", "--teacher", out)
    further = tmp_path / "further.safetensors"
    run(monkeypatch, training, *common, *more, "--sigma", 2, "--out", further)
    with safe_open(further, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    assert metadata["recipe"]["unlabelled"] == 2 and metadata["recipe"]["fine_tuned"]
    assert metadata["sigma"] == 2
    capsys.readouterr()

    with pytest.raises(SystemExit, match=r"no \.pts file"):
        run(monkeypatch, scoring, "--data", tmp_path, "--weights", out)
    monkeypatch.setattr(dlib_judge, "DlibJudge", Judge)
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match=r"no \.jpg file"):
        where = ("--data", tmp_path / "val", "--generated", tmp_path / "none")
        run(monkeypatch, scoring, *where, "--weights", out)
    Image.new("RGB", (96, 96)).save(tmp_path / "none" / "nobody.jpg")
    with pytest.raises(SystemExit, match=r"dlib sees no face"):
        run(monkeypatch, scoring, *where, "--weights", out)
    with pytest.raises(SystemExit, match=r"16 channels; say --width 16"):
        training.begin(out, 32)
    with pytest.raises(SystemExit):
        run(monkeypatch, training, *common, "--unlabelled", tmp_path, "--out", out)
    assert "--unlabelled needs a --teacher" in capsys.readouterr().err


def test_judges_are_held_against_annotated_mouths(
    siblings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    judges = script("evaluate_judges")
    ratios = (0.04, 0.2, 0.6)
    for k, ratio in enumerate(ratios):
        Image.new("RGB", (320, 320)).save(tmp_path / f"{k}.png")
        write_pts(tmp_path / f"{k}.pts", open_by(ratio))

    class HalfShut:
        """Sees every mouth half as open as it is."""

        def __init__(self) -> None:
            self.left = list(ratios)

        def look_at(self, picture: NDArray[np.uint8]) -> Any:
            assert picture.shape == (256, 256, 3)
            landmarks = open_by(self.left.pop(0) / 2).double().numpy()
            return dlib_judge.Verdict(True, landmarks, np.zeros(128))

    monkeypatch.setattr(judges, "DlibJudge", HalfShut)
    assert judges.main(["--data", str(tmp_path)]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["0 to 0.1", "0.1 to 0.3", "0.5 to 0.7"]
    found = [[float(n.strip("() ")) for n in row[3].strip().split(" ")] for row in rows]
    for numbers, half in zip(found, (0.02, 0.1, 0.3), strict=True):
        assert numbers == pytest.approx([half, -half], abs=2e-3)  # .pts files have three decimals
    judges.main(["--data", str(tmp_path), "--least", "0.5"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert judges.main(["--data", str(tmp_path / "none")]) == 2
    assert "error: " in capsys.readouterr().err


def open_by(ratio: float) -> Tensor:
    """[68, 2], the mean face with a mouth of that aspect ratio."""
    face = mean_face()
    middle = float(face[60, 1])
    face[61:64, 1] = middle
    face[65:68, 1] = middle + ratio * float(face[64, 0] - face[60, 0])
    return face
