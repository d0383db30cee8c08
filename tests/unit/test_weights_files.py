"""Third parties' files: what is trusted when, what is said, and what is never run."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from lmexp.errors import LmexpError
from lmexp.weights import __main__ as command_line
from lmexp.weights import converters, files, licences, registry, store, transfer
from lmexp.weights.download import index_certificates
from lmexp.weights.registry import FileEntry, Sdist

CONTENT = b"network" * 100
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class World:
    """A cache, one registered file, and a host that gives what it is told to."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.hub = root / "cache", root / "torch" / "hub" / "checkpoints"
        self.path = self.cache / "files" / "net.pkl"
        self.content: bytes | None = CONTENT
        self.brought = 0
        self.verified: bool | str | None = None
        self.said: list[str] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("LMEXP_CACHE", str(self.cache))
        monkeypatch.setenv("TORCH_HOME", str(root / "torch"))
        monkeypatch.setattr(transfer, "bring", self.bring)
        monkeypatch.setattr(licences, "_said", set())
        self.register()

    def register(self, **changes: object) -> FileEntry:
        entry = FileEntry(
            name="toy",
            purpose="a toy",
            licence="for play only",
            source="here",
            filename="net.pkl",
            megabytes=0.1,
            address="https://toys.example/net.pkl",
        )
        entry = replace(entry, **changes)  # type: ignore[arg-type]
        self._monkeypatch.setattr(registry, "FILES", {entry.name: entry})
        return entry

    def bring(
        self, address: str, target: Path, size: int | None = None, verify: bool | str = True
    ) -> Path:
        self.brought += 1
        self.verified = verify
        if self.content is None:
            raise LmexpError("no route to host")
        part = transfer.part_path(target)
        part.write_bytes(self.content)
        return part

    def fetch(self) -> Path:
        return store.file_path("toy", self.said.append)

    def fails(self, *reasons: str) -> None:
        with pytest.raises(LmexpError) as caught:
            self.fetch()
        message = str(caught.value)
        assert "\n" not in message
        for reason in reasons:
            assert reason in message


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_first_use_is_noted_and_said_and_later_uses_are_compared(world: World) -> None:
    assert world.fetch() == world.path and world.path.read_bytes() == CONTENT
    assert [line.split()[0] for line in world.said] == ["licence", "fetching", "toy:"]
    assert DIGEST[:12] in world.said[2] and "first use" in world.said[2]
    note = json.loads(files.note_path(world.path).read_text())
    assert note["sha256"] == DIGEST and note["bytes"] == len(CONTENT)
    assert note["address"] == "https://toys.example/net.pkl"
    world.said.clear()
    assert world.fetch() == world.path
    assert world.brought == 1 and not world.said
    world.path.write_bytes(CONTENT + b"!")
    world.fails("when first used", DIGEST[:12], files.note_path(world.path).name)


def test_host_whose_file_changed_is_not_believed(world: World) -> None:
    world.fetch().unlink()
    world.content = CONTENT[::-1]
    world.fails("noted when first used", DIGEST[:12], "remove net.pkl.note.json")
    assert not world.path.exists() and not transfer.part_path(world.path).exists()
    # Trusting the new one is the user's choice.
    files.note_path(world.path).unlink()
    assert world.fetch().read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("published", [DIGEST, DIGEST[:8]])
def test_published_digest_counts_from_the_first_use(world: World, published: str) -> None:
    world.register(sha256=published)
    world.content = CONTENT[::-1]
    world.fails("published is", published[:8])
    assert not world.path.exists()
    world.content = CONTENT
    world.fetch()
    # Eight digits are easily met on purpose, so that the rest is noted.
    assert files.note_path(world.path).exists() == (len(published) == 8)
    world.path.write_bytes(b"other")
    world.fails("published is")


def test_file_put_by_hand_is_checked_like_any_other(world: World) -> None:
    world.content = None
    world.fails("no route to host", "https://toys.example/net.pkl", "put net.pkl into")
    world.path.write_bytes(CONTENT)
    assert world.fetch() == world.path
    assert files.note_path(world.path).exists()


@pytest.mark.parametrize(
    ("content", "reason"), [(b"<!DOCTYPE html>no", "web page"), (b"", "0 bytes"), (b"x", "1 byte")]
)
def test_wrong_file_put_by_hand_is_named(world: World, content: bytes, reason: str) -> None:
    world.register(bytes=len(CONTENT))
    world.path.parent.mkdir(parents=True)
    world.path.write_bytes(content)
    world.fails(reason, str(world.path), "weights fetch toy")


def test_copy_of_torch_is_used_only_by_its_digest(world: World) -> None:
    world.content = None
    world.hub.mkdir(parents=True)
    copy = world.hub / "net.pkl"
    copy.write_bytes(CONTENT)
    world.fails("no route to host")
    entry = world.register(sha256=DIGEST[:10])
    assert world.fetch() == copy
    assert files.state(entry, world.cache, world.said.append) == "ready"
    copy.write_bytes(CONTENT[::-1])
    world.fails("no route to host")


def test_licence_is_shown_once_a_machine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.fetch()
    monkeypatch.setattr(licences, "_said", set())
    world.fetch()
    assert sum("for play only" in line for line in world.said) == 1
    # Another licence of the same file is news.
    world.register(licence="not for play")
    world.fetch()
    assert world.said[-1] == "licence of toy: not for play"
    (world.cache / "licences.json").write_text("damaged")
    world.fetch()
    assert world.said[-1] == "licence of toy: not for play"


def test_licence_in_a_cache_that_cannot_be_written_is_shown_once_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(licences, "_said", set())
    blocked = tmp_path / "file"
    blocked.write_text("")
    said: list[str] = []
    licences.say_once("toy", "MIT", blocked, said.append)
    licences.say_once("toy", "MIT", blocked, said.append)
    assert said == ["licence of toy: MIT"]


def test_cache_that_cannot_be_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cache.write_text("")
    world.fails("set LMEXP_CACHE")


def test_damaged_note_is_no_permission(world: World) -> None:
    world.fetch()
    files.note_path(world.path).write_text("{}")
    world.fails("net.pkl.note.json", "damaged", "remove it")


def test_checkpoint_is_a_name_or_a_path(world: World, tmp_path: Path) -> None:
    assert store.checkpoint_path("toy", world.said.append) == world.path
    own = tmp_path / "own.pkl"
    own.write_bytes(b"x")
    assert store.checkpoint_path(str(own)) == own
    with pytest.raises(LmexpError, match=r"no such file; give a path, or one of the names toy"):
        store.checkpoint_path("toys")
    with pytest.raises(LmexpError, match="a folder"):
        store.checkpoint_path(str(tmp_path))
    with pytest.raises(LmexpError, match="weights toys: unknown; choose one of toy"):
        store.file_path("toys")


def test_tensors_of_a_file_are_loaded_and_digested(world: World) -> None:
    buffer = io.BytesIO()
    state = {"a": torch.ones(2, 3, dtype=torch.float16), "n": torch.tensor(7)}
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    world.content = buffer.getvalue()
    world.register(read=converters.read_state_dict)
    stored = store.load("toy", world.said.append)
    assert stored.tensors["a"].dtype == torch.float32 and stored.tensors["n"].item() == 7
    assert stored.path == world.path and stored.sha256 == store.digest(stored.tensors)


@pytest.mark.filterwarnings("ignore")
def test_code_in_an_archive_is_not_compiled(tmp_path: Path) -> None:
    path = tmp_path / "traced.zip"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    with pytest.raises(LmexpError, match=r"not a readable checkpoint.*TorchScript") as caught:
        converters.read_state_dict(path)
    assert "\n" not in str(caught.value)


MARK = "setup.py was run"


@pytest.fixture
def index(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[World, Path]]:
    """A package index of one source distribution, whose setup.py leaves a mark when run."""
    folder = tmp_path / "index"
    folder.mkdir()
    archive = folder / "toy_models-1.0.tar.gz"
    mark = tmp_path / "mark"
    setup = f"open({str(mark)!r}, 'w').write({MARK!r})\n".encode()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in (("toy/net.pkl", CONTENT), ("toy/b.dat", b"b"), ("setup.py", setup)):
            member = tarfile.TarInfo(f"toy_models-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sdist = Sdist(
        "toy-models", "1.0", archive.name, hashlib.sha256(archive.read_bytes()).hexdigest(), 0.1
    )
    entry = world.register(address=None, sdist=sdist, member="toy/net.pkl", sha256=DIGEST)
    other = replace(
        entry,
        name="other",
        filename="b.dat",
        member="toy/b.dat",
        sha256=hashlib.sha256(b"b").hexdigest(),
    )
    registry.FILES["other"] = other
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    yield world, archive
    assert not mark.exists()


def test_sdist_gives_its_data_and_runs_nothing(index: tuple[World, Path]) -> None:
    world, archive = index
    assert world.fetch().read_bytes() == CONTENT
    archive.unlink()
    # One download serves all that is in it.
    assert store.file_path("other", world.said.append).read_bytes() == b"b"
    assert not any(path.name.startswith("fetch-") for path in world.cache.iterdir())


def test_sdist_that_is_absent_or_another(index: tuple[World, Path]) -> None:
    world, archive = index
    content = archive.read_bytes()
    archive.unlink()
    world.fails("toy-models 1.0 can't be fetched", "put toy_models-1.0.tar.gz into")
    placed = world.cache / "wheels" / archive.name
    placed.parent.mkdir(parents=True)
    placed.write_bytes(content[:-9])
    world.fails("is not that of toy-models 1.0")
    placed.write_bytes(content)
    assert world.fetch().read_bytes() == CONTENT


def test_sdist_without_the_member(index: tuple[World, Path]) -> None:
    world, _ = index
    registry.FILES["toy"] = replace(registry.FILES["toy"], member="toy/none")
    world.fails("need toy/none in it")


def test_registry_of_files_is_complete() -> None:
    names = [entry.filename for entry in registry.FILES.values()]
    assert len(set(names)) == len(names)
    assert not registry.FILES.keys() & registry.ENTRIES.keys()
    for name, entry in registry.FILES.items():
        assert entry.name == name and entry.purpose and entry.licence and entry.source
        assert (entry.address is None) == (entry.sdist is not None) == bool(entry.member)
        assert entry.address is None or entry.address.startswith("https://")
        assert set(entry.sha256) <= set("0123456789abcdef")
        # Digits that the authors put into the name are those that are asked for.
        stem = entry.filename.split(".")[0].rpartition("-")[2]
        if len(stem) in (8, 10) and set(stem) <= set("0123456789abcdef"):
            assert entry.sha256.startswith(stem)


def test_command_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["verify", "toy"]) == 1
    assert "toy: absent" in capsys.readouterr().out
    assert command_line.main(["fetch", "toy"]) == 0
    fetched = capsys.readouterr()
    assert f"toy: ready, {world.path}" in fetched.out
    assert "licence of toy: for play only" in fetched.err and "toys.example" in fetched.err
    assert command_line.main(["verify", "toy"]) == 0
    assert command_line.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "toys.example" in listed and "net.pkl" in listed and "for play only" in listed
    world.path.write_bytes(b"other")
    assert command_line.main(["verify", "toy"]) == 1
    assert "when first used" in capsys.readouterr().out
    world.path.unlink()
    world.content = None
    assert command_line.main(["fetch", "toy"]) == 2
    assert "put net.pkl into" in capsys.readouterr().err


def test_fetch_without_names_leaves_third_parties_files(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "ENTRIES", {})
    assert command_line.main(["fetch"]) == 0
    assert not world.brought


def test_interruption_is_no_traceback(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "bring", interrupt)
    assert command_line.main(["fetch", "toy"]) == 130
    assert "goes on from here" in capsys.readouterr().err


def test_sdist_of_a_real_index_is_brought_with_its_certificates(
    index: tuple[World, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, archive = index
    world.content = archive.read_bytes()
    monkeypatch.setenv("PIP_CERT", str(archive))
    assert index_certificates() == str(archive)
    monkeypatch.setattr(files, "find_sdist", lambda sdist: "https://index.example/toy.tar.gz")
    assert world.fetch().read_bytes() == CONTENT
    assert world.verified == str(archive)
    assert not list((world.cache / "files").glob("*.part*"))
    monkeypatch.delenv("PIP_CERT")
    assert index_certificates() is True


def test_process_that_waits_says_so(world: World) -> None:
    world.path.parent.mkdir(parents=True)
    with FileLock(world.path.parent / "net.pkl.lock"):
        waiting = threading.Thread(target=world.fetch)
        waiting.start()
        deadline = time.monotonic() + 10
        while not any("waiting" in line for line in world.said) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not world.path.exists()
    waiting.join(10)
    assert any("another process is fetching it" in line for line in world.said)
    assert world.path.read_bytes() == CONTENT
