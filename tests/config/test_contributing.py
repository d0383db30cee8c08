"""The guides' examples, taken out of the pages and run as they say."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lmexp.recording
from lmexp.recording.run_folder import RunFolder

PROJECT = Path(__file__).parents[2]
SOURCE = Path(lmexp.recording.__file__).parents[2]
BLOCK = re.compile(r"^`([^`\n]+)`[^\n]*\n\n```\w+\n(.*?)^```$", re.M | re.S)
GUIDES = {
    "CONTRIBUTING.md": {"pixels.py", "conf/loss/pixels.yaml", "test_pixels.py"},
    "docs/add_a_generator.md": {"stripes.py", "conf/generator/stripes.yaml"},
}


def write_files(guide: str, folder: Path) -> set[str]:
    """Write the files that the guide shows, and return their names."""
    found = dict(BLOCK.findall((PROJECT / guide).read_text()))
    for name, text in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return set(found)


def command(guide: str) -> list[str]:
    """The words after `python -m lmexp` in the guide's own command."""
    (line,) = re.findall(
        r"^    PYTHONPATH=\. python -m lmexp (.*)$", (PROJECT / guide).read_text(), re.M
    )
    return shlex.split(line)


def test_commands_have_their_brackets_in_quotes() -> None:
    """zsh takes them for a pattern of file names, and stops."""
    pages = [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")]
    commands = [
        line
        for page in pages
        for line in page.read_text().splitlines()
        if re.match(r" {4,}.*python3? ", line)
    ]
    assert len(commands) > 40
    unquoted = [re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line) for line in commands]
    assert [line for line in unquoted if re.search(r"=[[{]", line)] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_the_example_projects(guide: str, tmp_path: Path) -> None:
    assert write_files(guide, tmp_path) == GUIDES[guide]
    words = [*command(guide), "recording.video_frames=0", "figure=[loss_curves]"]
    answer = subprocess.run(
        [sys.executable, "-m", "lmexp", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    (status,) = (tmp_path / "runs").glob("*/status.json")
    folder = RunFolder(status.parent)
    metrics = folder.read_metrics()
    assert len(metrics) == 5
    if guide == "CONTRIBUTING.md":
        assert folder.read_config()["loss"]["pixels"]["weight"] == 2
        for line in metrics:
            assert line["raw"]["pixels"] > 0
            assert line["weighted"]["pixels"] == pytest.approx(2 * line["raw"]["pixels"], rel=1e-5)
    else:
        assert folder.read_config()["generator"]["_target_"] == "stripes.Stripes"
        assert folder.read_projection()[0].shape == (1, 3, 16)


def test_the_example_of_a_test_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files("CONTRIBUTING.md", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("example", tmp_path / "test_pixels.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    tests = [call for name, call in inspect.getmembers(example) if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
