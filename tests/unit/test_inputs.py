from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from lmexp import inputs
from lmexp.errors import LmexpError


def test_a_generated_face_is_its_seed() -> None:
    source = inputs.find("generated:12", "inputs.look")
    assert (source.label, source.digest, source.seed) == ("generated12", "generated:12", 12)
    assert source.path is None
    assert inputs.draw_z(12, 8).shape == (1, 8)
    assert not inputs.draw_z(12, 8).equal(inputs.draw_z(13, 8))


def test_a_photo_counts_by_its_content(tmp_path: Path) -> None:
    sample = inputs.find("sample:astronaut", "inputs.look")
    assert sample.path is not None and sample.label == "astronaut"
    assert sample.digest == hashlib.sha256(sample.path.read_bytes()).hexdigest()
    moved = tmp_path / "Me & my dög (2).PNG"
    shutil.copy(sample.path, moved)
    found = inputs.find(str(moved), "inputs.look")
    assert found.digest == sample.digest
    assert found.label == "Me_my_d_g_2"


def test_labels_are_never_empty_nor_long(tmp_path: Path) -> None:
    for name, label in (("ö.png", "photo"), (f"{'a' * 90}.png", "a" * 40)):
        (tmp_path / name).write_bytes(b"x")
        assert inputs.find(str(tmp_path / name), "inputs.look").label == label


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sample:moon", "inputs.look: no sample 'moon'.*astronaut"),
        ("generated:", "inputs.look: 'generated:' needs a whole number"),
        ("generated:-1", "whole number"),
        ("nowhere.jpg", "inputs.look: no file 'nowhere.jpg'"),
        (".", "is not a file"),
    ],
)
def test_refusals_name_the_key(text: str, said: str) -> None:
    with pytest.raises(LmexpError, match=said):
        inputs.find(text, "inputs.look")
