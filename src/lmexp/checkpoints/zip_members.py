"""Where the members of an uncompressed zip file lie in it.

Python's `zipfile` makes an object of every entry before one can look at their number, and
inflates; torch stores its members as they are. So a zip bomb is refused by its very method, and
nothing is unpacked: a member is a view of the file.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 to 4.3.16.
"""

from __future__ import annotations

import stat
import struct
from itertools import pairwise
from typing import Any

from lmexp.checkpoints.refusal import RefusedError, show

MAX_MEMBERS = 20_000

_AGAIN = "fetch it again"


def find_members(file: memoryview) -> dict[str, memoryview]:
    """Every member's bytes by its name, as views of `file`.

    Raises:
        RefusedError: it is damaged, has compressed, encrypted, linked, overlapping or repeated
            members, or names that point elsewhere.
    """
    count, size, start = _find_directory(file)
    if count > MAX_MEMBERS:
        raise RefusedError(f"the zip file has {count} members, more than any checkpoint")
    if start + size > len(file) or count * 46 > size:
        raise RefusedError("it is truncated", _AGAIN)
    members: dict[str, memoryview] = {}
    spans: list[tuple[int, int]] = [(start, start)]
    at, end = start, start + size
    for _ in range(count):
        name, where, length, at = _read_entry(file, at, end)
        if name in members:
            raise RefusedError(f"the zip file has two members called {show(name)}")
        begin = _data_start(file, where)
        if begin + length > start:
            raise RefusedError("it is truncated", _AGAIN)
        members[name] = file[begin : begin + length]
        spans.append((where, begin + length))
    if any(after[0] < before[1] for before, after in pairwise(sorted(spans))):
        raise RefusedError("the zip file's members overlap")
    return members


def _unpack(layout: str, file: memoryview, at: int) -> tuple[Any, ...]:
    if at < 0 or at + struct.calcsize(layout) > len(file):
        raise RefusedError("it is truncated", _AGAIN)
    return struct.unpack_from(layout, file, at)


def _find_directory(file: memoryview) -> tuple[int, int, int]:
    """Number of entries, size and start of the central directory."""
    tail_start = max(0, len(file) - 22 - 65535)
    found = bytes(file[tail_start:]).rfind(b"PK\x05\x06")
    if found < 0:
        raise RefusedError("it is truncated: a zip file without its directory", _AGAIN)
    at = tail_start + found
    count, size, start, note_size = _unpack("<HIIH", file, at + 10)
    if at + 22 + note_size != len(file):
        raise RefusedError("it is truncated, or something follows its zip file", _AGAIN)
    locator = at - 20
    if locator >= 0 and bytes(file[locator : locator + 4]) == b"PK\x06\x07":
        (record,) = _unpack("<Q", file, locator + 8)
        if bytes(file[record : record + 4]) != b"PK\x06\x06":
            raise RefusedError("the zip file is damaged", _AGAIN)
        count, size, start = _unpack("<QQQ", file, record + 32)
    return count, size, start


def _read_entry(file: memoryview, at: int, end: int) -> tuple[str, int, int, int]:
    """A member's name, start, length, and where the next entry is."""
    fields = _unpack("<4s4xHH8xIIHHH4xII", file, at)
    signature, flags, method, packed, length, name_size, extra_size, note_size = fields[:8]
    attributes, where = fields[8:]
    following = at + 46 + name_size + extra_size + note_size
    if signature != b"PK\x01\x02" or following > end:
        raise RefusedError("the zip file is damaged", _AGAIN)
    name = _require_safe(bytes(file[at + 46 : at + 46 + name_size]))
    if flags & 1:
        raise RefusedError(f"the zip file's member {show(name)} is encrypted")
    # The mode is in the upper half where the file comes from Unix.
    if stat.S_ISLNK(attributes >> 16):
        raise RefusedError(f"the zip file's member {show(name)} is a link")
    extra = at + 46 + name_size
    sizes = [length, packed, where]
    if 0xFFFFFFFF in sizes:
        sizes = _read_zip64(file, extra, extra + extra_size, sizes)
    length, packed, where = sizes
    if method != 0 and name.split("/")[1:2] == ["code"]:
        raise RefusedError("it is a TorchScript archive, a program", "give its checkpoint")
    if method != 0 or packed != length:
        raise RefusedError(
            f"the zip file's member {show(name)} is compressed, which torch never does",
            "unpack it if the checkpoint is inside",
        )
    return name, where, length, following


def _read_zip64(file: memoryview, at: int, end: int, sizes: list[int]) -> list[int]:
    while at + 4 <= end:
        kind, size = _unpack("<HH", file, at)
        if kind == 1:
            wide, at = [], at + 4
            for value in sizes:
                if value == 0xFFFFFFFF:
                    value, at = _unpack("<Q", file, at)[0], at + 8
                wide.append(value)
            return wide
        at += 4 + size
    raise RefusedError("the zip file is damaged", _AGAIN)


def _require_safe(raw: bytes) -> str:
    name = raw.decode("utf-8", "replace")
    parts = name.rstrip("/").split("/")
    if (
        "\\" in name
        or ":" in name
        or "\0" in name
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise RefusedError(f"the zip file has a member called {show(name)}, which points out of it")
    return name


def _data_start(file: memoryview, where: int) -> int:
    signature, name_size, extra_size = _unpack("<4s22xHH", file, where)
    if signature != b"PK\x03\x04":
        raise RefusedError("the zip file is damaged", _AGAIN)
    return int(where + 30 + name_size + extra_size)
