"""Hostile files are refused without side effect, in bounded time and memory."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch

from lmexp.checkpoints import torch_files
from lmexp.checkpoints.checkpoint import convert, load
from lmexp.checkpoints.pickles import MAX_OPCODES
from lmexp.errors import LmexpError


def load_fuzzer() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "fuzz_checkpoints.py"
    spec = importlib.util.spec_from_file_location("fuzz_checkpoints", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzzer = load_fuzzer()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMEXP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def refuse(folder: Path, data: bytes, seconds: float = 10.0) -> str:
    """Why a file is refused, within so much CPU time; nothing else may have happened on the way."""
    path = folder / "hostile.pkl"
    path.write_bytes(data)
    modules, entries = set(sys.modules), sorted(folder.rglob("*"))
    start = time.process_time()
    outcome, said = fuzzer.judge(path)
    assert time.process_time() - start < seconds
    assert outcome == "refused", said
    assert set(sys.modules) == modules
    assert sorted(folder.rglob("*")) == entries
    return str(said)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """A GLOBAL opcode."""
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + b"(" + b"".join(arguments) + b"tR"


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def in_zip(body: bytes, extra: dict[str, bytes] | None = None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", whole(body))
        archive.writestr("archive/version", b"3\n")
        for member, data in (extra or {}).items():
            archive.writestr(member, data)
    return file.getvalue()


def in_stream(body: bytes) -> bytes:
    return (
        torch_files.STREAM_START
        + pickle.dumps(1001, 2)
        + pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)
        + whole(body)
        + pickle.dumps([], 2)
    )


def in_persistence(body: bytes) -> bytes:
    """The body as the state of one of NVIDIA's persistence records."""
    return (
        name("torch_utils.persistence", "_reconstruct_persistent_obj")
        + b"(}("
        + b"".join(
            text(key) + text(value) for key, value in (("type", "class"), ("class_name", "G"))
        )
        + text("state")
        + body
        + b"utR"
    )


TOUCH = text("touch made_by_hostile_file")
CALLS = {
    "os.system": call("os", "system", TOUCH),
    "posix.system": call("posix", "system", TOUCH),
    "nt.system": call("nt", "system", TOUCH),
    "subprocess.Popen": call("subprocess", "Popen", TOUCH),
    "subprocess.check_output": call("subprocess", "check_output", b"]", TOUCH, b"a"),
    "builtins.eval": call("builtins", "eval", text("open('x', 'w')")),
    "builtins.exec": call("builtins", "exec", text("open('x', 'w')")),
    "builtins.open": call("builtins", "open", text("x"), text("w")),
    "builtins.getattr": call("builtins", "getattr", name("os", "path"), text("os")),
    "builtins.__import__": call("builtins", "__import__", text("antigravity")),
    "__builtin__.eval": call("__builtin__", "eval", text("1")),
    "builtins.getattr, chained": call(
        "builtins",
        "getattr",
        call("builtins", "getattr", name("collections", "OrderedDict"), text("__init__")),
        text("__globals__"),
    ),
    "operator.attrgetter": call("operator", "attrgetter", text("system")),
    "functools.partial": call("functools", "partial", name("os", "system"), TOUCH),
    "importlib.import_module": call("importlib", "import_module", text("antigravity")),
    "runpy.run_path": call("runpy", "run_path", text("x.py")),
    "pickle.loads": call("pickle", "loads", b"C\x02N."),
    "types.FunctionType": call("types", "FunctionType", b"NN"),
    "types.CodeType": call("types", "CodeType", b"NN"),
    "webbrowser.open": call("webbrowser", "open", text("http://localhost")),
    "shutil.rmtree": call("shutil", "rmtree", text(".")),
    "torch.load": call("torch", "load", text("x.pt")),
    "torch.hub.load": call("torch.hub", "load", text("x/y"), text("z")),
    "torch.save": call("torch", "save", b"N", text("made")),
    "torch.jit.load": call("torch.jit", "load", text("x")),
    "torch.utils.data.get_worker_info": call("torch.utils.data", "get_worker_info"),
    "torch._utils._import_dotted_name": call(
        "torch._utils", "_import_dotted_name", text("os.system")
    ),
    "torch.utils._config_module.save": call(
        "torch.utils._config_module", "load_config", b"C\x02N."
    ),
    "torch.storage._load_from_bytes, dotted": call("torch", "storage._load_from_bytes", b"C\x02N."),
    "torch.empty": call("torch", "empty", b"\x8a\x06\0\0\0\0\0\x10"),
    "numpy.load": call("numpy", "load", text("x.npy")),
    "numpy.memmap": call("numpy", "memmap", text("x")),
    "numpy.testing.rundocs": call("numpy.testing._private.utils", "runstring", text("1"), b"}"),
    "copyreg._reconstructor": call(
        "copyreg", "_reconstructor", name("os", "system"), name("builtins", "object"), b"N"
    ),
    "copy_reg._reconstructor": call("copy_reg", "_reconstructor", b"NNN"),
    "copyreg.__newobj__": call("copyreg", "__newobj__", name("os", "system")),
    "copyreg.add_extension": call("copyreg", "add_extension", text("os"), text("system"), b"K\x01"),
    "lmexp": call("lmexp.weights.store", "write", b"}", text("x")),
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "INST": b"(" + TOUCH + b"ios\nsystem\n",
    "OBJ": b"(" + name("os", "system") + TOUCH + b"o",
    "NEWOBJ of a function": name("os", "system") + b"(" + TOUCH + b"t\x81",
    "NEWOBJ of an allowed function": name("torch._utils", "_rebuild_tensor_v2") + b")\x81",
    "NEWOBJ_EX": name("collections", "OrderedDict") + b")}\x92",
    "PERSID": b"Pos.system\n",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93(" + TOUCH + b"tR",
    "STACK_GLOBAL, no text": b"K\x01K\x02\x93",
    "REDUCE of text": text("os.system") + b")R",
    "REDUCE of an allowed class": name("numpy", "ndarray") + b")R",
    "REDUCE with no tuple": name("collections", "OrderedDict") + b"]R",
    "REDUCE of what an allowed class made": name("collections", "OrderedDict") + b")R)R",
    "BUILD with slots": name("argparse", "Namespace") + b")\x81N}" + text("x") + b"K\x01s\x86b",
    "BUILD with __setstate__": name("argparse", "Namespace")
    + b")\x81}"
    + text("__setstate__")
    + name("os", "system")
    + b"sb",
    "BUILD with __class__": name("argparse", "Namespace") + b")\x81}" + text("__class__") + b"Nsb",
    "BUILD with __dict__": name("dnnlib.util", "EasyDict") + b")\x81}" + text("__dict__") + b"Nsb",
    "BUILD of a name": name("collections", "OrderedDict") + b"}b",
    "BUILD of a dictionary": b"}}b",
    "BUILD of a list": b"]}b",
    "numpy objects": call("numpy", "dtype", text("O8"), b"K\x00K\x01"),
    "numpy structures": call("numpy", "dtype", text("f4"), b"\x89\x88")
    + b"(K\x03"
    + text("<")
    + b"N(t}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
    "_codecs.encode to rot13": call("_codecs", "encode", text("x"), text("rot13")),
    "_codecs.encode of no bytes": call("_codecs", "encode", text("€"), text("latin1")),
    "_codecs.lookup": call("_codecs", "lookup", text("latin1")),
    "buffers": b"\x97",
    "a text protocol": b"I01\n",
}
WRAPS = {
    "pickle": whole,
    "zip": in_zip,
    "stream": in_stream,
    "persistence": lambda body: whole(in_persistence(b"}" + text("x") + body + b"s")),
}


@pytest.mark.parametrize("wrap", sorted(WRAPS))
@pytest.mark.parametrize("hostile", sorted(CALLS))
def test_calls_are_refused_without_side_effect(tmp_path: Path, hostile: str, wrap: str) -> None:
    said = refuse(tmp_path, WRAPS[wrap](CALLS[hostile]))
    # Refused for what it does, not because it comes to nothing.
    assert "no StyleGAN2 generator" not in said
    assert "lacks" not in said


def test_the_watch_sees_what_hostile_files_do(tmp_path: Path) -> None:
    with fuzzer.watched() as events:
        pickle.loads(whole(CALLS["os.system"]))
    assert any(event.startswith("os.system") for event in events)
    assert Path("made_by_hostile_file").is_file()
    with fuzzer.watched() as events:
        Path("made_too").open("w").close()
    assert any(event.startswith("open") for event in events)
    with fuzzer.watched() as events:
        os.close(os.open("made_as_well", os.O_CREAT | os.O_WRONLY))
    assert any(event.startswith("open") for event in events)
    with fuzzer.watched() as events:
        Path("made_too").read_bytes()
        pickle.loads(whole(b"N"))
    assert not events
    with fuzzer.watched() as events, pytest.raises(ImportError):
        pickle.loads(whole(name("this_is_no_module", "x")))
    assert any(event.startswith("import") for event in events)


def test_source_text_in_records_is_left_alone(tmp_path: Path) -> None:
    """It is part of every such file, a good one too; here it would end the program."""
    assert "SystemExit" in files.SOURCE_TEXT
    for make in (
        lambda: files.pickle_nvidia(files.nvidia_objects()),
        lambda: files.pickle_tensorflow(files.tensorflow_objects()),
    ):
        path = tmp_path / "good.pkl"
        path.write_bytes(make())
        convert(path, lambda _message: None)
        modules = set(sys.modules)
        outcome, said = fuzzer.judge(path)
        assert outcome == "read", said
        assert set(sys.modules) == modules


@pytest.mark.parametrize(
    "identity",
    [
        b"N",
        text("os.system"),
        b"(" + text("module") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01t",
        b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\x01t",
        b"(" + text("storage") + name("torch", "FloatStorage") + b"K\x00" + text("cpu") + b"K\x01t",
        b"("
        + text("storage")
        + name("torch", "FloatStorage")
        + text("../x")
        + text("cpu")
        + b"K\x01t",
        b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"J"
        b"\xff\xff\xff\xfft",
        b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01"
        b"(" + text("0") + b"K\x00K\x01tt",
        b"(" + text("storage") + name("torch", "FloatStorage") + text("k" * 99) + b"NK\x01t",
    ],
)
def test_persistent_ids_name_storages_alone(tmp_path: Path, identity: bytes) -> None:
    for wrap in WRAPS.values():
        said = refuse(tmp_path, wrap(identity + b"Q"))
        assert "no StyleGAN2 generator" not in said


def tensor(storage: bytes, *numbers: bytes) -> bytes:
    return (
        name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"".join(numbers) + b"\x89NtR"
    )


STORAGE = (
    b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
)
TERA = b"\x8a\x06\x00\x00\x00\x00\x00\x01"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((b"K\x00", TERA + b"\x85", b"K\x01\x85"), "impossible shape|beyond its storage"),
        ((b"K\x00", b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"), "beyond its storage"),
        ((b"K\x00", b"K\x05\x85", b"K\x01\x85"), "beyond its storage"),
        ((b"K\x01", b"K\x04\x85", b"K\x01\x85"), "beyond its storage"),
        ((b"K\x00", b"K\x02K\x02\x86", b"K\x03K\x01\x86"), "beyond its storage"),
        ((b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "impossible shape"),
        ((b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85"), "impossible shape"),
        ((b"K\x00", b"K\x01\x85", b"J\xff\xff\xff\xff\x85"), "impossible shape"),
        ((b"K\x00", b"K\x01\x85", b")"), "impossible shape"),
        ((b"K\x00", b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"), "impossible shape"),
        ((b"K\x00", b"\x88\x85", b"K\x01\x85"), "impossible shape"),
        ((b"K\x00", text("4"), b"K\x01\x85"), "impossible shape"),
        ((b"N", b"K\x01\x85", b"K\x01\x85"), "no storage"),
    ],
)
def test_tensors_stay_inside_their_storage(
    tmp_path: Path, parts: tuple[bytes, ...], reason: str
) -> None:
    import re

    data = in_zip(tensor(STORAGE, *parts), {"archive/data/0": b"\0" * 16})
    assert re.search(reason, refuse(tmp_path, data))
    assert "no storage" in refuse(tmp_path, in_zip(tensor(b"K\x01", *parts)))


def test_storages_claim_what_the_file_has(tmp_path: Path) -> None:
    small = {"archive/data/0": b"\0" * 12}
    said = refuse(tmp_path, in_zip(tensor(STORAGE, b"K\x00", b"K\x04\x85", b"K\x01\x85"), small))
    assert "12 bytes" in said
    huge = STORAGE.replace(b"K\x04t", TERA + b"t")
    said = refuse(tmp_path, in_zip(tensor(huge, b"K\x00", b"K\x04\x85", b"K\x01\x85"), small))
    assert "12 bytes" in said
    said = refuse(tmp_path, in_stream(tensor(huge, b"K\x00", b"K\x04\x85", b"K\x01\x85")))
    assert "exceeds the file" in said
    nested = call("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", 4) + b"\x80\x02N.")
    assert "begin as torch's do" in refuse(tmp_path, whole(nested))
    assert "storage in a storage" in refuse(tmp_path, in_stream(nested))


def test_many_names_of_one_storage_do_not_multiply_it(tmp_path: Path) -> None:
    """An 8 MB storage under the names of some 60 layers would take half a gigabyte."""
    objects = files.rosinality_objects()["g_ema"]
    shared = torch.zeros(2_000_000)
    side = 1400
    wide = {
        "style.1.weight": shared[: side * side].view(side, side),
        "style.1.bias": shared[:side],
    }
    for index in range(2, 60):
        wide[f"style.{index}.weight"] = wide["style.1.weight"]
        wide[f"style.{index}.bias"] = wide["style.1.bias"]
    rest = {key: value for key, value in objects.items() if not key.startswith("style.")}
    for key in list(rest):
        if key.endswith("modulation.weight"):
            rest[key] = shared[: rest[key].shape[0] * side].view(-1, side)
    assert "claim more than the file holds" in refuse(
        tmp_path, files.save_torch({"g_ema": {**rest, **wide}, "latent_avg": shared[:side]})
    )


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that blow up where a reader is naive."""
    laugh = b"]q\x00" + b"".join(
        b"](" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + b"eq" + bytes([level + 1])
        for level in range(100)
    )
    yield "billion laughs", whole(laugh + b"0" * 100)
    yield "tuples of tuples", whole(b")" + b"2\x86" * 190_000)
    yield "deep lists", whole(b"]" + b"]" * 195_000 + b"a" * 195_000)
    yield "deep dictionaries", whole(b"}" + b"N}" * 130_000 + b"s" * 130_000)
    yield "opcodes", whole(b"N0" * MAX_OPCODES)
    yield "marks", whole(b"(" * 390_000)
    yield "dup", whole(b"N" + b"2" * 390_000)
    yield "memo", whole(b"N" + b"".join(b"r" + struct.pack("<I", n) for n in range(390_000)))
    yield "memo far away", whole(b"Nr\xff\xff\xff\xff")
    yield "memo of nothing", whole(b"q\x00")
    yield "nothing in the memo", whole(b"h\x00")
    yield "long", whole(b"\x8b" + struct.pack("<I", 2**31 - 1) + b"\xff" * 1000)
    yield "long in full", whole(b"\x8b" + struct.pack("<I", 2**22) + b"\xff" * 2**22)
    yield "bytes", whole(b"\x8e" + struct.pack("<Q", 2**62))
    yield "text", whole(b"\x8d" + struct.pack("<Q", 2**62))
    yield "text in full", whole(b"X" + struct.pack("<I", 2**25) + b"x" * 2**25)
    yield "bad text", whole(b"X\x01\0\0\0\xff")
    yield "bytearray", whole(b"\x96" + struct.pack("<Q", 2**62))
    yield "frame", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N."
    yield "frame of more", b"\x80\x04\x95" + struct.pack("<Q", 99) + b"N."
    yield "protocol", b"\x80\x04\x80\xffN."
    yield "name without end", whole(b"c" + b"x" * 10_000)
    big = text("x" * 2**20) + b"q\x00"
    encode = call("_codecs", "encode", b"h\x00", text("latin1")) + b"0"
    yield "encodings", whole(big + encode * 10_000)
    state = b"}(" + b"".join(b"X\x01\0\0\0aN" for _ in range(100_000)) + b"uq\x01"
    build = name("argparse", "Namespace") + b")\x81h\x01b0"
    yield "builds of one state", whole(state + build * 100_000)
    record = in_persistence(b"h\x01") + b"0"
    yield "records of one state", whole(state + record * 20_000)
    shape = b"(" + b"K\x01" * 190_000 + b"tq\x02"
    rebuild = name("torch._utils", "_rebuild_tensor_v2") + b"(NK\x00h\x02h\x02\x89NtR0"
    yield "tensors of one shape", whole(shape + rebuild * 100_000)
    collisions = b"}(" + b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(90_000)
    )
    yield "keys of one hash", whole(collisions + b"u")
    yield "self", whole(b"]q\x00h\x00ah\x00h\x00\x86q\x01\x85" + b"\x85" * 1000)
    many = b"}(" + b"".join(text(f"k{n}") + b"N" for n in range(10_000)) + b"u"
    yield "many keys", whole(many)
    yield "odd items", whole(b"}(Nu")
    yield "items of a list", whole(b"](NNu")
    yield "append to a tuple", whole(b")Na")
    yield "add to a list", whole(b"](N\x90")
    yield "pop", whole(b"0")
    yield "pop below a mark", whole(b"N(0")
    yield "no mark", whole(b"t")
    yield "two values", whole(b"NN")
    yield "no value", whole(b"")
    yield "open mark", whole(b"N(")


@pytest.mark.parametrize(("label", "data"), list(bombs()), ids=[label for label, _ in bombs()])
def test_bombs_take_little_time(tmp_path: Path, label: str, data: bytes) -> None:
    for made in (data, in_zip(data[2:-1])):
        refuse(tmp_path, made, seconds=15)


def test_a_bomb_that_takes_too_long_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzer, "SECONDS", 0.02)
    path = tmp_path / "memo.pkl"
    path.write_bytes(dict(bombs())["memo"])
    outcome, said = fuzzer.judge(path)
    assert outcome == "failed" and "TooSlowError" in said


def test_the_clock_does_not_ring_where_coverage_holds_a_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exception there left the lock held, and the tests hung, once in a thousand times."""
    monkeypatch.setattr(fuzzer, "SECONDS", 0.005)
    space: dict[str, Any] = {"__name__": "coverage.collector", "time": time}
    body = "def hold(until):\n    while time.process_time() < until: pass\n    return True"
    exec(body, space)
    released = False
    with pytest.raises(fuzzer.TooSlowError), fuzzer.watched():
        released = space["hold"](time.process_time() + 0.05)
        end = time.process_time() + 10
        while time.process_time() < end:
            pass
    assert released and time.process_time() < end


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    """In a process of its own that may have 600 MiB beyond what Python and torch take at start."""
    for number, (_, data) in enumerate(bombs()):
        (tmp_path / f"{number}.pkl").write_bytes(data)
    code = """
        import resource, sys
        from pathlib import Path
        from lmexp.checkpoints.checkpoint import convert
        from lmexp.errors import LmexpError

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 600 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        refused = 0
        for path in sorted(Path(sys.argv[1]).glob("*.pkl")):
            try:
                convert(path, print)
            except LmexpError:
                refused += 1
        print(refused)
    """
    count = len(list(tmp_path.glob("*.pkl")))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert done.stdout.strip() == str(count), done.stderr[-2000:]


def module(children: bytes, memo: int) -> bytes:
    state = (
        b"}("
        + text("_parameters")
        + b"}"
        + text("_buffers")
        + b"}"
        + text("_modules")
        + children
        + b"u"
    )
    return in_persistence(state) + b"q" + bytes([memo])


def test_modules_that_contain_each_other_are_refused(tmp_path: Path) -> None:
    """Children that are one object, twenty levels deep, are more modules than a walk can visit."""
    body = module(b"}", 1)
    for level in range(2, 20):
        child = b"h" + bytes([level - 1])
        keys = b"".join(text(f"b{n}") + child for n in range(20))
        body += b"0" + module(b"}(" + keys + b"u", level)
    assert "nested" in refuse(tmp_path, whole(body), seconds=5)
    shallow = module(b"}", 1)
    for level in range(2, 5):
        keys = b"".join(text(f"b{n}") + b"h" + bytes([level - 1]) for n in range(100))
        shallow += b"0" + module(b"}(" + keys + b"u", level)
    assert "nested" in refuse(tmp_path, whole(shallow), seconds=5)
    long = module(b"}" + text("x" * 1000) + module(b"}", 1) + b"s", 2)
    assert "named" in refuse(tmp_path, whole(long))


def raw_zip(*members: tuple[str, bytes], **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", options.get("method", zipfile.ZIP_STORED)) as archive:
        for member, data in members:
            entry = zipfile.ZipInfo(member)
            entry.compress_type = options.get("method", zipfile.ZIP_STORED)
            entry.external_attr = options.get("mode", 0o600) << 16
            archive.writestr(entry, data)
    return file.getvalue()


PICKLE = ("archive/data.pkl", b"\x80\x02}.")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (raw_zip(PICKLE, ("../evil", b"x")), "points out of it"),
        (raw_zip(PICKLE, ("archive/../../evil", b"x")), "points out of it"),
        (raw_zip(PICKLE, ("/etc/evil", b"x")), "points out of it"),
        (raw_zip(PICKLE, ("archive\\evil", b"x")), "points out of it"),
        (raw_zip(PICKLE, ("c:evil", b"x")), "points out of it"),
        (raw_zip(PICKLE, ("archive//evil", b"x")), "points out of it"),
        (raw_zip(PICKLE, mode=0o120777), "is a link"),
        (raw_zip(PICKLE, PICKLE), "two members"),
        (raw_zip(PICKLE, ("other/data.pkl", b"x")), "not one that torch saved"),
        (raw_zip(PICKLE, ("other/data", b"x")), "beside its checkpoint"),
        (
            raw_zip(PICKLE, ("archive/bomb", b"\0" * 10**7), method=zipfile.ZIP_DEFLATED),
            "compressed",
        ),
        (raw_zip(*((f"archive/{n}", b"") for n in range(20_001))), "20001 members"),
        (raw_zip(PICKLE, ("archive/byteorder", b"big")), "big-endian"),
        (raw_zip(("archive/data.pkl", b"\x80\x02}.more")), "bytes follow"),
        (raw_zip(PICKLE)[:-1], "truncated"),
        (raw_zip(PICKLE).replace(b"PK\x01\x02", b"PK\x01\x09"), "damaged"),
        (
            raw_zip(PICKLE).replace(
                b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"
            ),
            "encrypted",
        ),
    ],
)
def test_zip_files_with_tricks_are_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reason in refuse(tmp_path, data)


def test_zip_directories_that_lie_are_refused(tmp_path: Path) -> None:
    good = raw_zip(PICKLE, ("archive/data/0", b"0123456789"))
    end = good.rindex(b"PK\x05\x06")
    directory = struct.unpack_from("<I", good, end + 16)[0]
    for offset, layout in ((8, "<H"), (10, "<H"), (12, "<I"), (16, "<I")):
        for value in (2**16 - 1, 2**15, 200):
            changed = bytearray(good)
            struct.pack_into(layout, changed, end + offset, value)
            if offset != 8:
                refuse(tmp_path, bytes(changed))
    for offset, value in ((20, 5000), (24, 5000), (42, 5000), (42, 0xFFFFFFFF), (28, 9999)):
        changed = bytearray(good)
        struct.pack_into("<I", changed, directory + offset, value)
        refuse(tmp_path, bytes(changed))
    second = good.index(b"PK\x01\x02", directory + 4)
    changed = bytearray(good)
    struct.pack_into("<I", changed, second + 42, 0)
    assert "overlap" in refuse(tmp_path, bytes(changed))


def test_large_zip_records_are_read(tmp_path: Path) -> None:
    """The forms for more than 4 GiB, which torch may write for small files too."""
    from lmexp.checkpoints.zip_members import find_members

    local = b"PK\x03\x04" + struct.pack("<5H3I2H", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, 1, 0)
    data = local + b"a" + b"hello"
    extra = struct.pack("<HHI", 9, 4, 0) + struct.pack("<HHQQQ", 1, 24, 5, 5, 0)
    entry = b"PK\x01\x02" + struct.pack(
        "<6H3I5H2I",
        45,
        45,
        0,
        0,
        0,
        0,
        0,
        2**32 - 1,
        2**32 - 1,
        1,
        len(extra),
        0,
        0,
        0,
        0,
        2**32 - 1,
    )
    directory = entry + b"a" + extra
    start = len(data)
    record = b"PK\x06\x06" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 1, 1, len(directory), start)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, start + len(directory), 1)
    tail = b"PK\x05\x06" + struct.pack(
        "<4H2IH", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0
    )
    made = data + directory + record + locator + tail
    assert bytes(find_members(memoryview(made))["a"]) == b"hello"
    said = refuse(tmp_path, made.replace(b"PK\x06\x06", b"PK\x06\x09"))
    assert "damaged" in said


def test_hostile_safetensors_are_refused(tmp_path: Path) -> None:
    for header in (
        b'{"__metadata__":{"format":"lmexp-stylegan2","format_version":"1"}}',
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
        b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}',
        b"{" * 100_000,
    ):
        refuse(tmp_path, len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refuse(tmp_path, (2**21).to_bytes(8, "little") + b"{" + b" " * 2**21)


def test_nothing_is_written_through_a_link_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "good.pkl"
    path.write_bytes(files.pickle_tensorflow(files.tensorflow_objects()))
    folder = tmp_path / "cache" / "checkpoints"
    folder.mkdir(parents=True)
    source = convert(path, lambda _message: None).source_sha256
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    copy = folder / f"{source}-v1.safetensors"
    copy.symlink_to(victim)
    assert load(path, lambda _message: None).kind == "stylegan2-tensorflow"
    assert victim.read_bytes() == b"precious"
    assert copy.is_file() and not copy.is_symlink()


def test_damaged_files_give_a_network_or_one_line(tmp_path: Path) -> None:
    """A short run of `scripts/fuzz_checkpoints.py`, the same cases every time."""
    corpus = fuzzer.make_corpus()
    path = tmp_path / "case"
    outcomes = {"read": 0, "refused": 0}
    for data in corpus.values():
        path.write_bytes(data)
        convert(path, lambda _message: None)
    for number in range(400):
        rng = random.Random(number)
        kind = rng.choice(sorted(corpus))
        path.write_bytes(fuzzer.mutate(kind, corpus[kind], corpus, rng))
        outcome, said = fuzzer.judge(path)
        assert outcome in outcomes, f"case {number} ({kind}): {said}"
        outcomes[outcome] += 1
    assert outcomes["refused"] > 100
    assert outcomes["read"] > 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20


def test_faults_name_no_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pkl"
    path.write_bytes(whole(text("os\x1b[31m\r") + text("system\x00") + b"\x93"))
    with pytest.raises(LmexpError) as caught:
        convert(path, print)
    assert str(caught.value).isprintable()
