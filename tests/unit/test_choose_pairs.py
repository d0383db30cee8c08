"""Pairs drawn from annotated faces: the same ones anywhere, of the kinds that are asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmexp.landmarks.pts import write_pts

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import choose_pairs


def face(mouth: float, turn: float) -> Tensor:
    """Landmarks whose lips are that far open and whose nose is there between the jaw's ends."""
    landmarks = torch.zeros(68, 2)
    landmarks[0], landmarks[16] = torch.tensor([0.0, 50.0]), torch.tensor([100.0, 50.0])
    landmarks[36:42], landmarks[42:48] = torch.tensor([30.0, 40.0]), torch.tensor([70.0, 40.0])
    landmarks[30] = torch.tensor([100 * turn, 60.0])
    landmarks[60], landmarks[64] = torch.tensor([40.0, 80.0]), torch.tensor([60.0, 80.0])
    landmarks[62], landmarks[66] = torch.tensor([50.0, 80.0]), torch.tensor([50.0, 80 + 20 * mouth])
    # Turned in the image: neither number may care.
    c, s = 0.8, 0.6
    return landmarks @ torch.tensor([[c, s], [-s, c]]) + 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(40):
        mouth = (0.0, 0.6)[index % 2]
        turn = 0.3 + 0.4 * (index // 2 % 2)
        write_pts(tmp_path / f"{index:02}.pts", face(mouth, turn))
        (tmp_path / f"{index:02}.jpg").touch()
    (tmp_path / "unannotated.jpg").touch()
    return tmp_path


def draw(out: Path, *words: str) -> list[tuple[int, int]]:
    assert choose_pairs.main([*words, "--out", str(out)]) == 0
    pairs = [json.loads(line.removeprefix("- ")) for line in out.read_text().splitlines()]
    return [(int(Path(look).stem), int(Path(expression).stem)) for look, expression in pairs]


def test_landmarks_are_measured(folder: Path) -> None:
    faces = choose_pairs.read_faces([folder], ())
    assert len(faces) == 40
    assert faces[1].mouth == pytest.approx(0.6, abs=1e-3) and faces[2].mouth < 1e-3
    assert faces[1].turn == pytest.approx(0.3, abs=1e-3)
    assert faces[2].turn == pytest.approx(0.7, abs=1e-3)


def test_pairs_are_of_three_kinds_and_no_picture_comes_twice(folder: Path, tmp_path: Path) -> None:
    words = ("--looks", str(folder), "--count", "8", "--seed", "3")
    pairs = draw(tmp_path / "a.yaml", *words)
    assert pairs == draw(tmp_path / "again.yaml", *words)
    assert pairs != draw(tmp_path / "other.yaml", *words[:-1], "4")
    opening = [(look % 2, expression % 2) for look, expression in pairs]  # odd ones are open
    assert opening == [(0, 1)] * 4 + [(1, 0)] * 2 + [(0, 0)] * 2
    assert len({name for pair in pairs for name in pair}) == 16
    # Heads that are turned alike, unless any may be.
    assert all(a // 2 % 2 == b // 2 % 2 for a, b in pairs)
    free = draw(tmp_path / "free.yaml", *words, "--turn", "1")
    assert any(a // 2 % 2 != b // 2 % 2 for a, b in free)


def test_what_was_drawn_before_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    words = ("--looks", str(folder), "--count", "6")
    first = draw(tmp_path / "a.yaml", *words)
    second = draw(tmp_path / "b.yaml", *words, "--without", str(tmp_path / "a.yaml"))
    assert not {n for pair in first for n in pair} & {n for pair in second for n in pair}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--looks", "FOLDER", "--count", "30"), "no face with an open mouth is left"),
        (("--looks", "EMPTY"), "no picture with a .pts file beside it"),
        (("--looks", "FOLDER", "--without", "FOLDER/00.pts"), "not a list of pairs"),
    ],
)
def test_one_line_says_what_is_amiss(
    words: tuple[str, ...],
    said: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    given = [word.replace("FOLDER", str(folder)).replace("EMPTY", str(empty)) for word in words]
    assert choose_pairs.main([*given, "--out", str(tmp_path / "x.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "x.yaml").exists()
