"""Where a result comes from: versions, device, and the code's git revision with its changes."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import lmexp

PACKAGES = (
    "lmexp",
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "pillow",
    "safetensors",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "dlib-bin",
    "lpips",
    "wandb",
    "av",
    "matplotlib",
)
"""What a result may depend on; what is not installed is left out."""


@dataclass(frozen=True)
class GitState:
    """The checkout that the code ran from.

    Attributes:
        revision: commit, 40 hex digits.
        diff: what tracked files differ in from it, as `git diff` prints it.
        untracked: paths of files that git neither tracks nor ignores, relative to the root.
    """

    revision: str
    diff: str
    untracked: tuple[str, ...]

    @property
    def dirty(self) -> bool:
        """Whether the code is not exactly the revision's."""
        return bool(self.diff or self.untracked)

    def as_dict(self) -> dict[str, str | bool | list[str]]:
        """For summary.json: revision, dirty, and for a dirty checkout the diff's sha256."""
        described: dict[str, str | bool | list[str]] = {
            "revision": self.revision,
            "dirty": self.dirty,
        }
        if self.diff:
            described["diff_sha256"] = hashlib.sha256(self.diff.encode()).hexdigest()
        if self.untracked:
            described["untracked"] = list(self.untracked)
        return described


@cache
def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Their versions: looked up once, for it takes as long as writing a picture."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_versions() -> dict[str, str]:
    """Versions of Python, of the system and of the installed ones of `PACKAGES`."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        **_installed(PACKAGES),
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def describe_device(device: torch.device | str) -> str:
    """The device's name for people, such as "NVIDIA H200" or "x86_64 CPU, 2 threads"."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return str(device)


def identify_device(device: torch.device | str) -> str | None:
    """The GPU's UUID, as nvidia-smi lists it: which of several it was; None for a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def describe_git(package: Path | None = None) -> GitState | None:
    """The checkout that lmexp runs from.

    Args:
        package: folder of the code; lmexp's own unless told.

    Returns:
        None if it is no checkout: an installed package, even one that is installed
        inside another project's checkout, or a machine without git.
    """
    folder = Path(lmexp.__file__).parent if package is None else package
    # Only a tracked file says that this checkout is the code's own.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git(folder, "rev-parse", "HEAD")
    if revision is None:
        return None
    root = (_git(folder, "rev-parse", "--show-toplevel") or str(folder)).strip()
    others = _git(Path(root), "ls-files", "--others", "--exclude-standard") or ""
    return GitState(
        revision=revision.strip(),
        diff=_git(Path(root), "diff", "HEAD", "--no-ext-diff", "--no-color") or "",
        untracked=tuple(others.splitlines()),
    )


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where it refuses or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
