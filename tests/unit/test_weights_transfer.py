"""Downloads from a host that stands for all that goes wrong: a server of this test's own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from lmexp.errors import LmexpError
from lmexp.weights import transfer

CONTENT = bytes(range(256)) * 6000
"""1.5 MB: several chunks."""


class Host:
    """A file server whose behaviour the tests choose.

    Attributes:
        content: what it serves.
        etag: its validator; None for none.
        modified: a second one; None for none.
        ranges: whether it can serve parts.
        cut: after how many bytes of a body the connection breaks, as often as the list is long.
        status: replies with this, once for each entry.
        kind: Content-Type.
        length: whether it says how long the body is.
        requests: the Range header of every request so far.
    """

    def __init__(self) -> None:
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.modified: str | None = None
        self.ranges = True
        self.heeds_if_range = True
        self.shift = 0
        self.cut: list[int] = []
        self.status: list[int] = []
        self.kind = "application/octet-stream"
        self.length = True
        self.redirect: str | None = None
        self.requests: list[str | None] = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/net.bin"

    def serve(self, reply: BaseHTTPRequestHandler) -> None:
        asked = reply.headers.get("Range")
        self.requests.append(asked)
        if self.redirect and reply.path == "/net.bin":
            reply.send_response(302)
            reply.send_header("Location", self.redirect)
            reply.end_headers()
            return
        if self.status:
            reply.send_response(self.status.pop(0))
            reply.send_header("Content-Length", "0")
            reply.end_headers()
            return
        start = 0
        fresh = not self.heeds_if_range or reply.headers.get("If-Range") in (
            self.etag,
            self.modified,
        )
        if asked and self.ranges and fresh:
            start = int(asked.removeprefix("bytes=").rstrip("-")) + self.shift
            if start >= len(self.content):
                reply.send_response(416)
                reply.send_header("Content-Length", "0")
                reply.end_headers()
                return
            reply.send_response(206)
            total = len(self.content)
            reply.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            reply.send_response(200)
        body = self.content[start:]
        if self.length:
            reply.send_header("Content-Length", str(len(body)))
        if self.etag:
            reply.send_header("ETag", self.etag)
        if self.modified:
            reply.send_header("Last-Modified", self.modified)
        reply.send_header("Content-Type", self.kind)
        reply.end_headers()
        reply.wfile.write(body[: self.cut.pop(0)] if self.cut else body)
        reply.wfile.flush()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Host()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "net.bin"


def fails(host: Host, target: Path, reason: str, **keywords: int) -> None:
    with pytest.raises(LmexpError, match=reason) as caught:
        transfer.bring(host.address, target, **keywords)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_a_file_arrives_and_gets_its_name_only_when_settled(host: Host, target: Path) -> None:
    part = transfer.bring(host.address, target, len(CONTENT))
    assert part.read_bytes() == CONTENT and not target.exists()
    transfer.settle(target)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["net.bin"]
    assert host.requests == [None]


def test_goes_on_where_the_connection_broke(host: Host, target: Path) -> None:
    host.cut = [600_000, 300_000]
    assert transfer.bring(host.address, target).read_bytes() == CONTENT
    starts = [int(asked.removeprefix("bytes=")[:-1]) for asked in host.requests[1:] if asked]
    # At most a chunk of what had arrived is asked for again.
    assert len(starts) == 2 and 600_000 - transfer.CHUNK < starts[0] <= 600_000
    assert starts[1] > starts[0] + 300_000 - transfer.CHUNK


def test_a_later_process_goes_on(host: Host, target: Path) -> None:
    part = transfer.part_path(target)
    host.cut = [600_000, *[0] * 9]
    fails(host, target, "connection|IncompleteRead|bytes read")
    kept = part.stat().st_size
    assert 0 < kept <= 600_000
    host.cut, host.requests = [], []
    assert transfer.bring(host.address, target).read_bytes() == CONTENT
    assert host.requests == [f"bytes={kept}-"]


def test_a_complete_part_is_not_asked_for_again(host: Host, target: Path) -> None:
    transfer.bring(host.address, target)
    transfer.bring(host.address, target)
    assert len(host.requests) == 1


def test_host_without_ranges_starts_again(host: Host, target: Path) -> None:
    host.ranges = False
    host.cut = [600_000]
    assert transfer.bring(host.address, target).read_bytes() == CONTENT


@pytest.mark.parametrize("heeds", [True, False])
def test_file_that_changed_starts_again(host: Host, target: Path, heeds: bool) -> None:
    host.cut = [600_000, *[0] * 9]
    fails(host, target, "connection|IncompleteRead|bytes read")
    host.content, host.etag, host.cut = CONTENT[::-1], '"two"', []
    host.heeds_if_range = heeds
    assert transfer.bring(host.address, target).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(
    ("etag", "modified", "resumes"),
    [
        (None, None, False),
        ('W/"weak"', None, False),
        ('W/"weak"', "Tue, 24 Nov 2026 17:00:00 GMT", True),
        (None, "Tue, 24 Nov 2026 17:00:00 GMT", True),
    ],
)
def test_only_a_strong_validator_lets_it_go_on(
    host: Host, target: Path, etag: str | None, modified: str | None, resumes: bool
) -> None:
    host.etag, host.modified, host.cut = etag, modified, [600_000]
    assert transfer.bring(host.address, target).read_bytes() == CONTENT
    assert (host.requests[1] is not None) == resumes


def test_another_range_than_asked_for_starts_again(host: Host, target: Path) -> None:
    host.cut, host.shift = [600_000], 7
    assert transfer.bring(host.address, target).read_bytes() == CONTENT
    assert host.requests[2] is None


def test_file_that_became_shorter_starts_again(host: Host, target: Path) -> None:
    host.cut = [900_000, *[0] * 9]
    fails(host, target, "connection|IncompleteRead|bytes read")
    host.content, host.cut = CONTENT[:1000], []
    assert transfer.bring(host.address, target).read_bytes() == CONTENT[:1000]


def test_a_part_of_another_address_or_damaged_note_is_not_continued(
    host: Host, target: Path
) -> None:
    part = transfer.part_path(target)
    for note in ("", "[]", '{"address": "http://elsewhere/", "total": 99, "etag": "x"}'):
        part.write_bytes(b"old")
        part.with_name(part.name + ".json").write_text(note)
        assert transfer.bring(host.address, target).read_bytes() == CONTENT
        transfer.discard(target)
    assert host.requests == [None] * 3 and not list(target.parent.iterdir())


def test_busy_hosts_are_asked_again(host: Host, target: Path) -> None:
    host.status = [503, 429, 500]
    assert transfer.bring(host.address, target).read_bytes() == CONTENT
    host.status = [503] * 9
    transfer.discard(target)
    fails(host, target, "HTTP 503")


@pytest.mark.parametrize("status", [403, 404, 410])
def test_refusals_are_final(host: Host, target: Path, status: int) -> None:
    host.status = [status] * 3
    fails(host, target, f"HTTP {status}")
    assert len(host.requests) == 1


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_web_page_in_place_of_the_file(host: Host, target: Path, kind: str) -> None:
    host.content, host.kind = b"\n <!DOCTYPE html><html><body>log in</body></html>", kind
    fails(host, target, "web page in place")


def test_wrong_size_is_noticed(host: Host, target: Path) -> None:
    fails(host, target, "has 1536000 bytes, expected 5", size=5)
    host.length = False
    fails(host, target, "sent 1536000 bytes, expected 5", size=5)
    assert transfer.bring(host.address, target).read_bytes() == CONTENT


def test_nobody_there(target: Path, host: Host) -> None:
    address = host.address
    host.server.shutdown()
    host.server.server_close()
    with pytest.raises(LmexpError) as caught:
        transfer.bring(address, target)
    assert "\n" not in str(caught.value) and "refused" in str(caught.value)


def test_unencrypted_redirection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = requests.Response()
    reply.url, reply.status_code = "http://host/net.bin", 200
    with pytest.raises(LmexpError, match="unencrypted"):
        transfer._judge(reply, "https://host/net.bin", 0, transfer.Origin("https://host/net.bin"))


def test_redirections_are_followed(host: Host, target: Path) -> None:
    host.redirect = host.address.replace("net.bin", "other.bin")
    assert transfer.bring(host.address, target).read_bytes() == CONTENT


def test_folder_that_cannot_be_written(host: Host, tmp_path: Path) -> None:
    with pytest.raises(LmexpError, match="can't be written"):
        transfer.bring(host.address, tmp_path / "none" / "net.bin")


def test_host_that_gives_crumbs_ends_some_time(
    host: Host, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "MOST_ATTEMPTS", 3)
    monkeypatch.setattr(transfer, "CHUNK", 10)
    host.cut = [20] * 9
    fails(host, target, "broke 3 times")


PROCESS = """
import sys
from dataclasses import replace
from lmexp.weights import registry, store
entry = registry.FileEntry("toy", "a toy", "MIT", "here", "net.bin", 1.5, address=sys.argv[1])
registry.FILES["toy"] = entry
print(store.file_path("toy"))
"""


def test_parallel_processes_fetch_once(host: Host, tmp_path: Path) -> None:
    environment = {**os.environ, "LMEXP_CACHE": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, host.address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 2, results
    path = tmp_path / "files" / "net.bin"
    assert [out.strip() for out, _ in results] == [str(path)] * 2
    assert host.requests == [None]
    assert path.read_bytes() == CONTENT
    said = "".join(err for _, err in results)
    assert said.count("licence of toy: MIT") == 1
    assert said.count("fetching net.bin") == 1
    assert said.count(hashlib.sha256(CONTENT).hexdigest()[:12]) == 1
