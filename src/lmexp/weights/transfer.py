"""Bring one file over HTTPS, going on where an earlier attempt was cut off."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import requests
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lmexp.errors import LmexpError
from lmexp.weights.converters import first_line

ATTEMPTS = 5
"""Attempts in a row that bring nothing before the host is given up."""

MOST_ATTEMPTS = 200
"""Attempts in all, for a host that drops the connection after every few bytes."""

UNREACHED = 3
"""As how many of them an attempt counts that did not even reach the host."""

PAUSE = 0.5
"""Before the second attempt, s; doubled before each further one."""

TIMEOUT = (10.0, 60.0)
"""For a connection, and for the next bytes, s."""

CHUNK = 1 << 18
"""Bytes that are written at once; as many may be lost where the connection breaks."""


class InterruptedTransferError(Exception):
    """The attempt ended early; the next may go on from there."""


class UnreachedHostError(InterruptedTransferError):
    """There was no connection at all: waiting long would only delay the message."""


class StalePartError(InterruptedTransferError):
    """What is kept does not fit what the host has; the next attempt starts again."""


@dataclass(frozen=True)
class Origin:
    """What a part-file is part of: it is only continued with bytes of the same.

    Attributes:
        address: where it came from.
        etag, modified: the host's validators of this version of the file; empty without.
        total: bytes of the whole file; None if the host does not say.
    """

    address: str
    etag: str = ""
    modified: str = ""
    total: int | None = None

    @property
    def validator(self) -> str:
        """For the header If-Range; a weak ETag may not stand there (RFC 9110, 13.1.5)."""
        return self.modified if self.etag.startswith("W/") or not self.etag else self.etag


def part_path(target: Path) -> Path:
    """Where the beginning of an unfinished `target` is kept."""
    return target.with_name(target.name + ".part")


def looks_like_web_page(beginning: bytes) -> bool:
    """Whether a file's first bytes are HTML: an error or login page in its place."""
    start = beginning.lstrip(b"\xef\xbb\xbf \t\r\n")[:20].lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<!-- ", b"<?xml"))


def bring(address: str, target: Path, size: int | None = None, verify: bool | str = True) -> Path:
    """Download to `target`.part and return that path, complete but not yet checked.

    What is there already is kept if the host says that it is still the same file, and only
    the rest is asked for. A caller that finds the result wrong must call `discard`.

    Args:
        address: https; redirections to anything unencrypted are refused.
        target: the final path; its folder exists.
        size: the exact number of bytes, if known.
        verify: False, or the path of a certificate bundle, in place of the usual one.

    Raises:
        LmexpError: no connection, a refusal, a web page in place of the file, another size,
            no space. A one-line reason without a way out, which only the caller knows.
    """
    part = part_path(target)
    fruitless = 0
    with _bar(target.name) as (bar, task):
        for _ in range(MOST_ATTEMPTS):
            before = _length(part)
            try:
                _attempt(address, part, size, verify, bar, task)
                return part
            except InterruptedTransferError as error:
                if isinstance(error, StalePartError):
                    discard(target)
                count = UNREACHED if isinstance(error, UnreachedHostError) else 1
                fruitless = 0 if _length(part) > before else fruitless + count
                if fruitless >= ATTEMPTS:
                    raise LmexpError(first_line(error)) from error
                time.sleep(PAUSE * 2**fruitless)
            except OSError as error:
                reason = "no space left" if error.errno == errno.ENOSPC else first_line(error)
                raise LmexpError(f"{part} can't be written: {reason}") from error
    raise LmexpError(f"the connection broke {MOST_ATTEMPTS} times")


def discard(target: Path) -> None:
    """Remove the beginning of a download and the note of what it is part of."""
    part = part_path(target)
    part.unlink(missing_ok=True)
    _note_path(part).unlink(missing_ok=True)


def settle(target: Path) -> None:
    """Give a complete and checked download its name."""
    part = part_path(target)
    part.chmod(0o644)
    part.replace(target)
    _note_path(part).unlink(missing_ok=True)


def _attempt(
    address: str, part: Path, size: int | None, verify: bool | str, bar: Progress, task: TaskID
) -> None:
    have, origin = _kept(address, part)
    if have and have == origin.total:
        return
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": origin.validator}
    reached = False
    try:
        with requests.get(
            address, headers=headers, stream=True, timeout=TIMEOUT, verify=verify
        ) as reply:
            reached = True
            found = _judge(reply, address, have, origin)
            if size is not None and found.total is not None and found.total != size:
                raise LmexpError(f"the host's file has {found.total} bytes, expected {size}")
            _note_path(part).write_text(json.dumps(asdict(found)), encoding="utf-8")
            resumed = reply.status_code == requests.codes.partial_content
            bar.update(task, total=found.total, completed=have if resumed else 0)
            with part.open("ab" if resumed else "wb") as file:
                for chunk in reply.iter_content(CHUNK):
                    if not file.tell() and looks_like_web_page(chunk):
                        raise LmexpError("the host sent a web page in place of the file")
                    file.write(chunk)
                    bar.advance(task, len(chunk))
    except requests.exceptions.SSLError as error:
        raise LmexpError(f"the host's certificate is not trusted: {_reason(error)}") from error
    except requests.exceptions.RequestException as error:
        kind = InterruptedTransferError if reached else UnreachedHostError
        raise kind(_reason(error)) from error
    if found.total is not None and _length(part) < found.total:
        raise InterruptedTransferError("the connection broke")
    wanted = size if size is not None else found.total
    if wanted is not None and _length(part) != wanted:
        length = _length(part)
        part.unlink()
        raise LmexpError(f"the host sent {length} bytes, expected {wanted}")


def _judge(reply: requests.Response, address: str, have: int, origin: Origin) -> Origin:
    """What the host is about to send, if it is the file from the place asked for."""
    if address.startswith("https:") and not reply.url.startswith("https:"):
        raise LmexpError("the host redirects to an unencrypted address")
    status = reply.status_code
    if status == requests.codes.partial_content:
        unit, _, span = reply.headers.get("Content-Range", "").partition(" ")
        start, _, rest = span.partition("-")
        total = rest.partition("/")[2]
        same = reply.headers.get("ETag", origin.etag) == origin.etag
        if unit == "bytes" and start == str(have) and total == str(origin.total) and same:
            return origin
        raise StalePartError("the host sent another range than asked for")
    if status == requests.codes.requested_range_not_satisfiable:
        raise StalePartError("the host's file is shorter than what is kept of it")
    if status in (408, 425, 429) or status >= 500:
        raise InterruptedTransferError(f"HTTP {status} {reply.reason}")
    if status != requests.codes.ok:
        raise LmexpError(f"HTTP {status} {reply.reason}")
    kind = reply.headers.get("Content-Type", "")
    if kind.startswith(("text/html", "application/xhtml")):
        raise LmexpError("the host sent a web page in place of the file")
    length = reply.headers.get("Content-Length", "")
    encoded = reply.headers.get("Content-Encoding", "identity") != "identity"
    return Origin(
        address,
        etag=reply.headers.get("ETag", ""),
        modified=reply.headers.get("Last-Modified", ""),
        total=int(length) if length.isdigit() and not encoded else None,
    )


def _kept(address: str, part: Path) -> tuple[int, Origin]:
    """Bytes that can be continued, and of what; 0 if there are none."""
    try:
        origin = Origin(**json.loads(_note_path(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return 0, Origin(address)
    have = _length(part)
    if origin.address != address or origin.total is None or have > origin.total:
        return 0, Origin(address)
    # Without a validator nobody can tell whether the host's file is still the same.
    return (have, origin) if origin.validator or have == origin.total else (0, origin)


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: BaseException) -> str:
    """The innermost cause that says something, in one line."""
    text = first_line(error)
    inner = error.args[0] if error.args else None
    while isinstance(inner, BaseException):
        text = first_line(inner)
        inner = getattr(inner, "reason", None) or (inner.args[-1] if inner.args else None)
    return text


@contextmanager
def _bar(name: str) -> Iterator[tuple[Progress, TaskID]]:
    console = Console(file=sys.stderr)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        yield bar, bar.add_task(name, total=None)
