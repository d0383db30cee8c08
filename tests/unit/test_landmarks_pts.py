"""300-W annotations: read as written, refused in one line otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmexp.errors import LmexpError
from lmexp.landmarks.pts import read_pts, write_pts

HEADER = "version: 1\nn_points: 2\n{\n"


def test_points_are_counted_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.pts"
    path.write_text(HEADER + "1.00 1.00\n 10.5  20.25\n}\n")
    assert read_pts(path, count=2).tolist() == [[0.0, 0.0], [9.5, 19.25]]


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pts"
    path.write_bytes((HEADER + "3 4\n5 6\n}\n").replace("\n", "\r\n").encode())
    assert read_pts(path, count=2).tolist() == [[2.0, 3.0], [4.0, 5.0]]


def test_written_points_are_read_back(tmp_path: Path) -> None:
    points = torch.rand(68, 2, generator=torch.Generator().manual_seed(0)) * 300 - 20
    write_pts(tmp_path / "a.pts", points)
    torch.testing.assert_close(read_pts(tmp_path / "a.pts"), points, atol=0.0051, rtol=0)
    assert (tmp_path / "a.pts").read_text().startswith("version: 1\nn_points: 68\n{\n")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no points between braces"),
        ("version: 1\nn_points: 2\n1 2\n3 4\n", "no points between braces"),
        (HEADER + "1 2\n3 4\n", "no points between braces"),
        (HEADER + "1 2\n}\n", "1 points; 2 are needed"),
        (HEADER + "1 2\n3 4\n5 6\n}\n", "3 points; 2 are needed"),
        (HEADER + "1 2\n3 4 5\n}\n", "'3 4 5' is not a point"),
        (HEADER + "1 2\n3 four\n}\n", "'3 four' is not a point"),
        (HEADER + "1 2\n3 nan\n}\n", "'3 nan' is not finite"),
        (HEADER + "1 2\ninf 3\n}\n", "'inf 3' is not finite"),
        ("\N{MICRO SIGN}" + HEADER + "1 2\n3 4\n}\n", "not a text file"),
    ],
)
def test_faults_are_said_in_one_line(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "a.pts"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(LmexpError) as caught:
        read_pts(path, count=2)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LmexpError, match=r"none\.pts: No such file"):
        read_pts(tmp_path / "none.pts")
