"""The pickles and containers that checkpoints come in, read into inert values.

Three containers: a plain pickle, in which storages lie as byte strings; torch's stream of pickles
followed by storages (before version 1.6, and inside plain pickles to this day); torch's zip file.

Source: `torch/serialization.py`, `_legacy_save` and `_save`.
"""

from __future__ import annotations

import struct

from lmexp.checkpoints.pickles import Budget, PickleReader, StandIn
from lmexp.checkpoints.refusal import RefusedError, show
from lmexp.checkpoints.stand_ins import names_for, set_state
from lmexp.checkpoints.values import ElementType, Record, Storage
from lmexp.checkpoints.zip_members import find_members

STREAM_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The magic number that torch's streams begin with, as a pickle."""

MAX_KEY = 64
"""Letters of a storage's key; torch uses numbers."""

_AGAIN = "fetch it again"


def read_pickle(file: memoryview) -> object:
    """Read a plain pickle, such as NVIDIA's.

    Raises:
        RefusedError: it is damaged, or asks for anything but tensors and plain values.
    """
    budget = Budget(text=len(file), binary=len(file))
    names = names_for(budget, lambda data: _read_storage(data, budget))
    value, end = PickleReader(file, names, budget, set_state).read()
    if end != len(file):
        raise RefusedError(f"{len(file) - end} bytes follow the end of its pickle", _AGAIN)
    return value


def read_stream(file: memoryview) -> object:
    """Read torch's stream format, such as rosinality's older files.

    Raises:
        RefusedError: it is damaged, or asks for anything but tensors and plain values.
    """
    return _read_stream(file, Budget(text=len(file), binary=len(file)))


def read_zip(file: memoryview) -> object:
    """Read torch's zip format.

    Raises:
        RefusedError: it is damaged, or asks for anything but tensors and plain values.
    """
    members = find_members(file)
    pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
    root = pickles[0].split("/")[0] if pickles else ""
    if any(name.startswith((f"{root}/code/", f"{root}/constants.pkl")) for name in members):
        raise RefusedError("it is a TorchScript archive, a program", "give its checkpoint")
    if len(pickles) != 1:
        raise RefusedError("it is a zip file, but not one that torch saved", "unpack it")
    if any(not name.startswith(f"{root}/") for name in members):
        raise RefusedError("the zip file has members beside its checkpoint")
    if bytes(members.get(f"{root}/byteorder", b"little")[:7]) != b"little":
        raise RefusedError("it was saved on a big-endian machine", "save it again on another one")
    budget = Budget(text=len(file), binary=len(file))
    storages: dict[str, Storage] = {}

    def find_storage(identity: object) -> Storage:
        element, key, count = _read_identity(identity, 5)
        data = members.get(f"{root}/data/{key}")
        if data is None:
            raise RefusedError(f"the storage {show(key)} is missing", _AGAIN)
        known = storages.get(key)
        if known is None or known.element is not element:
            storages[key] = known = Storage(element, count)
            known.fill(data)
        return known

    source = members[pickles[0]]
    reader = PickleReader(source, names_for(budget, None), budget, set_state, find_storage)
    value, end = reader.read()
    if end != len(source):
        raise RefusedError("bytes follow the end of its pickle", _AGAIN)
    return value


def _read_identity(identity: object, length: int) -> tuple[ElementType, str, int]:
    """Element type, key and number of elements of the storage that a persistent id stands for."""
    if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
        raise RefusedError("its pickle refers to something outside of it that is no storage")
    kind, key, _location, count = identity[1:5]
    element = kind.value if isinstance(kind, StandIn) else None
    fits = isinstance(key, str) and len(key) <= MAX_KEY and type(count) is int
    if not isinstance(element, ElementType) or not isinstance(key, str) or not fits:
        raise RefusedError("its pickle refers to a storage in an unknown way")
    # An older torch told of storages that are parts of others; none of these files has them.
    if len(identity) > length or (len(identity) == 6 and identity[5] is not None):
        raise RefusedError("its pickle refers to a part of a storage")
    assert isinstance(count, int)
    return element, key, count


def _read_storage(data: memoryview, budget: Budget) -> Storage:
    value = _read_stream(data, budget)
    if not isinstance(value, Storage):
        raise RefusedError("its pickle holds a storage that is none")
    return value


def _read_stream(source: memoryview, budget: Budget) -> object:
    if bytes(source[: len(STREAM_START)]) != STREAM_START:
        raise RefusedError("a storage does not begin as torch's do", _AGAIN)
    storages: dict[str, Storage] = {}

    def find_storage(identity: object) -> Storage:
        element, key, count = _read_identity(identity, 6)
        known = storages.get(key)
        if known is None:
            if not 0 <= count * element.size <= len(source):
                raise RefusedError(f"a storage of {count} elements exceeds the file", _AGAIN)
            storages[key] = known = Storage(element, count)
        elif known.element is not element or known.count != count:
            raise RefusedError(f"the storage {show(key)} is described in two ways", _AGAIN)
        return known

    names = names_for(budget, None)

    def read(at: int, references: bool = False) -> tuple[object, int]:
        reader = PickleReader(
            source, names, budget, set_state, find_storage if references else None
        )
        return reader.read(at)

    _version, at = read(len(STREAM_START))
    machine, at = read(at)
    if not isinstance(machine, Record) or machine.fields().get("little_endian") is not True:
        raise RefusedError("it was saved on a big-endian machine", "save it again on another one")
    value, at = read(at, references=True)
    keys, at = read(at)
    if not isinstance(keys, list) or len(keys) != len(storages):
        raise RefusedError("its storages are not all there", _AGAIN)
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.data is not None or at + 8 > len(source):
            raise RefusedError("its storages are not all there", _AGAIN)
        (count,) = struct.unpack_from("<q", source, at)
        if count != storage.count:
            raise RefusedError("a storage has another size than its tensors say", _AGAIN)
        at += 8
        storage.fill(source[at : at + count * storage.element.size])
        at += count * storage.element.size
    if at != len(source):
        raise RefusedError("bytes follow its last storage", _AGAIN)
    return value
