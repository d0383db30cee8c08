from __future__ import annotations

import hashlib
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from lmexp.recording import provenance
from lmexp.recording.provenance import describe_device, describe_git, describe_versions


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "src" / "lmexp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text("runs/\n.venv/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return package


def test_a_clean_checkout_is_its_revision(checkout: Path) -> None:
    state = describe_git(checkout)
    assert state is not None
    assert state.as_dict() == {
        "revision": git(checkout, "rev-parse", "HEAD").strip(),
        "dirty": False,
    }


def test_a_changed_checkout_tells_its_changes(checkout: Path) -> None:
    (checkout / "__init__.py").write_text("changed = 1\n")
    (checkout / "new.py").write_text("")
    (checkout.parent.parent / "runs").mkdir()
    (checkout.parent.parent / "runs" / "ignored.txt").write_text("")
    state = describe_git(checkout)
    assert state is not None and state.dirty
    assert "+changed = 1" in state.diff
    assert state.untracked == ("src/lmexp/new.py",)
    described = state.as_dict()
    assert described["diff_sha256"] == hashlib.sha256(state.diff.encode()).hexdigest()
    assert described["untracked"] == ["src/lmexp/new.py"]


def test_a_package_installed_inside_anothers_checkout_has_no_revision(checkout: Path) -> None:
    installed = checkout.parent.parent / ".venv" / "lmexp"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert describe_git(installed) is None


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    monkeypatch.setenv("PATH", "")
    assert describe_git(checkout) is None


def test_versions_name_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package-anywhere"))
    found = describe_versions()
    assert found["python"] == platform.python_version()
    assert found["numpy"].split(".")[0].isdigit()
    assert "no-such-package-anywhere" not in found


def test_devices_have_names_for_people() -> None:
    assert describe_device("cpu") == (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    assert describe_device(torch.device("meta")) == "meta"
