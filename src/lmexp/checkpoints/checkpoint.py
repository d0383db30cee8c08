"""StyleGAN2 checkpoints of any known kind: read by content, converted once, always validated."""

from __future__ import annotations

import contextlib
import json
import mmap
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmexp.checkpoints import nvidia, rosinality, tensorflow, torch_files
from lmexp.checkpoints.networks import Network
from lmexp.checkpoints.refusal import RefusedError, show
from lmexp.checkpoints.values import Record
from lmexp.errors import LmexpError
from lmexp.generators.stylegan2_config import (
    StyleGAN2Config,
    StyleGAN2DiscriminatorConfig,
    tensor_shapes,
)
from lmexp.weights.converters import first_line
from lmexp.weights.store import cache_folder, digest

Say = Callable[[str], None]

FORMAT = "lmexp-stylegan2"
FORMAT_VERSION = "1"
"""Of our safetensors files; a converter that would give other tensors needs another number."""

OWN_KIND = "lmexp"
MAX_FILE_BYTES = 16 * 2**30
MAX_OWN_HEADER = 2**20

_KNOWN = "StyleGAN2-ADA or StyleGAN2 .pkl, rosinality .pt, lmexp .safetensors"
_CHUNK = 2**24


@dataclass(frozen=True)
class Checkpoint:
    """A StyleGAN2 in memory.

    Attributes:
        generator: the generator's config.
        tensors: by canonical name, see `stylegan2_config`: float32, finite, on the CPU; the
            discriminator's begin with `discriminator.`.
        discriminator: its config, None if there is none.
        kind: the program that wrote it: "stylegan2-ada-pytorch", "stylegan2-tensorflow",
            "rosinality"; files that lmexp converted keep their source's.
        source_sha256: of the file that was given.
        notes: what a user should know of it, such as why there is no discriminator.
    """

    generator: StyleGAN2Config
    tensors: dict[str, Tensor]
    discriminator: StyleGAN2DiscriminatorConfig | None
    kind: str
    source_sha256: str
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def load(path: Path, say: Say) -> Checkpoint:
    """Read a checkpoint; nothing in it is run or imported.

    What kind it is, its content tells. A file of another program is converted once, into the
    cache folder under its SHA-256; a damaged copy there is made again.

    Args:
        path: the file, or a link to one.
        say: receives one line for everything that takes time or that the user should know.

    Raises:
        LmexpError: there is no such file, or it is no StyleGAN2 checkpoint that can be read safely.
    """
    with _open(path) as file:
        source = _hash(file)
        with _refusals(path):
            if _is_safetensors(file):
                return _read_own(path, source)
    return _load_converted(path, source, say)


def convert(path: Path, say: Say) -> Checkpoint:
    """Read a checkpoint as `load` does, without the cache.

    Raises:
        LmexpError: there is no such file, or it is no StyleGAN2 checkpoint that can be read safely.
    """
    with _open(path) as file:
        source = _hash(file)
        with _refusals(path):
            if _is_safetensors(file):
                return _read_own(path, source)
            network = _read_foreign(file)
            tensors = network.read(len(file))
    for note in network.notes:
        say(f"{path}: {note}")
    return Checkpoint(
        network.generator,
        tensors,
        network.discriminator,
        network.kind,
        source,
        tuple(network.notes),
    )


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write our safetensors file, which is either whole or absent; an existing one is replaced.

    Raises:
        LmexpError: it can't be written.
    """
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": checkpoint.kind,
        "source_sha256": checkpoint.source_sha256,
        "generator": checkpoint.generator.to_json(),
        "notes": json.dumps(checkpoint.notes),
        "content_sha256": digest(checkpoint.tensors),
    }
    if checkpoint.discriminator is not None:
        metadata["discriminator"] = checkpoint.discriminator.to_json()
    try:
        # A folder of our own, so that nobody can have put a link where the part file goes.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
            part = Path(folder) / "part"
            save_file(checkpoint.tensors, part, metadata)
            # The writer keeps files to their owner; a cache may be shared.
            part.chmod(0o644)
            part.replace(path)
    except (OSError, SafetensorError) as fault:
        raise LmexpError(
            f"{path}: can't be written ({first_line(fault)}); free space, or choose another folder"
        ) from fault


def validate(checkpoint: Checkpoint) -> None:
    """Hold a checkpoint against its configs.

    Raises:
        RefusedError: names, shapes, types or values are not what its configs ask for.
    """
    expected = tensor_shapes(checkpoint.generator)
    if checkpoint.discriminator is not None:
        expected |= tensor_shapes(checkpoint.discriminator)
    differing = sorted(set(expected) ^ set(checkpoint.tensors))
    if differing:
        what = "lacks" if differing[0] in expected else "has an unknown"
        raise RefusedError(f"it {what} {show(differing[0])}", "convert it again")
    for name, tensor in checkpoint.tensors.items():
        if tuple(tensor.shape) != expected[name] or tensor.dtype != torch.float32:
            raise RefusedError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, expected float32 "
                f"{list(expected[name])}",
                "convert it again",
            )
        if not torch.isfinite(tensor).all():
            raise RefusedError(f"{name} has values that are not finite", "convert it again")


def _load_converted(path: Path, source: str, say: Say) -> Checkpoint:
    from filelock import FileLock

    folder = cache_folder() / "checkpoints"
    copy = folder / f"{source}-v{FORMAT_VERSION}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{source}.lock")
        with lock:
            if copy.is_file():
                try:
                    with _refusals(copy):
                        return _read_own(copy, source)
                except LmexpError as fault:
                    say(f"{fault}; making it again")
            say(f"{path}: reading it for the first time")
            checkpoint = convert(path, say)
            if checkpoint.source_sha256 != source:
                raise LmexpError(
                    f"{path}: it changed while it was read; try again when it is complete"
                )
            write(checkpoint, copy)
            return checkpoint
    except OSError as fault:
        raise LmexpError(
            f"{folder}: can't be used ({first_line(fault)}); set LMEXP_CACHE to a folder that "
            "can be written"
        ) from fault


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except RefusedError as refusal:
        way_out = refusal.way_out or f"give one of: {_KNOWN}"
        raise LmexpError(f"{path}: {refusal.reason}; {way_out}") from refusal
    except LmexpError as fault:
        raise LmexpError(f"{path}: {fault}") from fault


@contextlib.contextmanager
def _open(path: Path) -> Iterator[memoryview]:
    """A regular file's bytes."""
    try:
        # A pipe would wait for its other end when it is opened, so look first.
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise LmexpError(f"{path}: it is a folder; give the checkpoint file in it")
        if not stat.S_ISREG(status.st_mode):
            raise LmexpError(f"{path}: it is no file; give one of: {_KNOWN}")
        if not 0 < status.st_size <= MAX_FILE_BYTES:
            size = "it is empty" if not status.st_size else f"it has {status.st_size} bytes"
            raise LmexpError(f"{path}: {size}; fetch it again")
        with path.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as fault:
        raise LmexpError(
            f"{path}: can't be read ({first_line(fault)}); check the path and its permissions"
        ) from fault
    # Views of it may outlive this block in a traceback; the last one closes it.
    yield memoryview(mapped)


def _hash(file: memoryview) -> str:
    total = sha256()
    for start in range(0, len(file), _CHUNK):
        total.update(file[start : start + _CHUNK])
    return total.hexdigest()


def _read_foreign(file: memoryview) -> Network:
    value = _read_value(file)
    if tensorflow.matches(value):
        return tensorflow.convert(value)
    if isinstance(value, Record):
        if nvidia.matches(value):
            return nvidia.convert(value)
        if rosinality.matches(value):
            return rosinality.convert(value)
        keys = ", ".join(show(key, 30) for key in list(value.fields())[:5])
        raise RefusedError(f"it holds no StyleGAN2 generator, but: {keys or 'nothing with a name'}")
    raise RefusedError("it holds no StyleGAN2 generator")


def _read_value(file: memoryview) -> object:
    start = bytes(file[:1024])
    if start.startswith(torch_files.STREAM_START):
        return torch_files.read_stream(file)
    if start.startswith(b"PK\x03\x04"):
        return torch_files.read_zip(file)
    if len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5:
        return torch_files.read_pickle(file)
    raise RefusedError(*_describe(start))


def _describe(start: bytes) -> tuple[str, str]:
    """What an unknown file is, going by its first bytes, and the way out."""
    text = start.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file", "run git lfs pull"
    if text.startswith(("<!doctype html", "<html", "<head", "<?xml")):
        return (
            "it is a web page, which a download returned in place of the file",
            "fetch it again in a browser",
        )
    for magic, name in (
        (b"\x1f\x8b", "a gzip archive"),
        (b"BZh", "a bzip2 archive"),
        (b"\xfd7zXZ", "an xz archive"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!", "a RAR archive"),
    ):
        if start.startswith(magic):
            return f"it is {name}", "unpack it"
    if start[257:262] == b"ustar":
        return "it is a tar archive", "unpack it"
    if start.startswith(b"\x89HDF"):
        return "it is an HDF5 file", f"give one of: {_KNOWN}"
    if start.startswith(b"PK"):
        return "it is an empty or split zip file", "fetch it again"
    # ONNX has no magic number: field 1, the version, then field 2, the producer's name.
    if len(start) > 3 and start[0] == 0x08 and start[2] == 0x12:
        return "it looks like an ONNX model", f"give one of: {_KNOWN}"
    if _is_text(start):
        return "it is a text file", f"give one of: {_KNOWN}"
    return "its content is of no known kind", f"give one of: {_KNOWN}"


def _is_text(start: bytes) -> bool:
    # A character may be cut where the excerpt ends.
    for cut in range(4 if len(start) == 1024 else 1):
        try:
            text = start[: len(start) - cut].decode()
        except UnicodeDecodeError:
            continue
        return all(character >= " " or character in "\t\r\n\f" for character in text)
    return False


def _is_safetensors(file: memoryview) -> bool:
    header = int.from_bytes(file[:8], "little")
    return len(file) > 9 and file[8] == ord("{") and header < 2**48


def _read_own(path: Path, source: str) -> Checkpoint:
    """Read a safetensors file of ours."""
    with path.open("rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
    if header + 8 > path.stat().st_size:
        raise RefusedError("it is truncated", "fetch it again")
    if header > MAX_OWN_HEADER:
        raise RefusedError("its header is larger than any network's")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise RefusedError(
                    "it is a safetensors file, but not one that lmexp made",
                    "convert the original with scripts/convert_checkpoint.py",
                )
            if metadata.get("format_version") != FORMAT_VERSION:
                raise RefusedError(
                    f"its format has version {show(metadata.get('format_version'))}, this lmexp "
                    f"reads {FORMAT_VERSION}",
                    "convert the original again",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as fault:
        raise RefusedError(
            f"it is damaged ({show(first_line(fault), 120)})", "fetch it again"
        ) from fault
    checkpoint = Checkpoint(
        StyleGAN2Config.from_json(metadata.get("generator", "")),
        tensors,
        StyleGAN2DiscriminatorConfig.from_json(metadata["discriminator"])
        if "discriminator" in metadata
        else None,
        show(metadata.get("kind", OWN_KIND)),
        source,
        _read_notes(metadata.get("notes", "[]")),
    )
    validate(checkpoint)
    if digest(tensors) != metadata.get("content_sha256"):
        raise RefusedError("it is damaged: its content is not what was written", "fetch it again")
    return checkpoint


def _read_notes(text: str) -> tuple[str, ...]:
    try:
        notes = json.loads(text)
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, list) or len(notes) > 10:
        raise RefusedError("its metadata is damaged", "convert the original again")
    return tuple(show(note, 300) for note in notes)
