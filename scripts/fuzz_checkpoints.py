"""Damage checkpoints of every kind at random, and see that the readers refuse them or read them.

    python scripts/fuzz_checkpoints.py --minutes 10

Each case is one valid file with one to six changes: to bytes, to spans, to the opcodes of a
pickle (in a zip file too) or to the header of a safetensors file. A case fails if the reader
raises anything but an `LmexpError` of one line, takes more than `SECONDS` of CPU time, wants more
memory than `--megabytes`, or makes Python import, compile, run or write anything, which an audit
hook tells. Failing cases are kept.

Exit status: 0 if no case failed, else 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))

import checkpoint_files

from lmexp.checkpoints.checkpoint import convert, validate, write
from lmexp.errors import LmexpError

SECONDS = 10.0
FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "pickle.find_class",
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "code.__new__",
    "marshal.",
)
HARMLESS = ("os.scandir", "os.listdir")
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63)
HOSTILE = (
    b"cos\nsystem\n(X\x04\x00\x00\x00truetR",
    b"cbuiltins\neval\n(X\x01\x00\x00\x001tR",
    b"ctorch\nload\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n)R",
    b"cnumpy\ndtype\n",
    b"ccopyreg\n_reconstructor\n",
    b"\x82\x01",
    b"\x83\x01\x00",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"r\xff\xff\xff\xff",
    b"]2222222222(2222tttaee",
)


class TooSlowError(Exception):
    """A case took more CPU time than `SECONDS`."""


def make_corpus() -> dict[str, bytes]:
    """Valid files by name: every kind, and ours."""
    files = checkpoint_files.all_files()
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source", Path(folder) / "made"
        source.write_bytes(files["nvidia"])
        write(convert(source, lambda _message: None), made)
        return {**files, "lmexp": made.read_bytes()}


def mutate(name: str, data: bytes, corpus: dict[str, bytes], rng: random.Random) -> bytes:
    """A damaged copy of `data`, which is of the kind `name`."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if name == "lmexp" and rng.random() < 0.5:
            data = _change_header(data, rng)
        elif name == "rosinality-zip" and rng.random() < 0.6:
            data = _change_member(data, rng)
        elif name not in ("lmexp", "rosinality-zip") and rng.random() < 0.6:
            data = _change_opcodes(data, rng)
        else:
            data = _change_bytes(data, corpus, rng)
    return data


def _change_bytes(data: bytes, corpus: dict[str, bytes], rng: random.Random) -> bytes:
    changed = bytearray(data)
    if not changed:
        return b"\x80"
    # What matters lies near both ends as often as anywhere.
    zone = rng.choice((len(changed), 256, 4096))
    at = rng.randrange(min(zone, len(changed)))
    if rng.random() < 0.3:
        at = len(changed) - 1 - at
    length = rng.choice((1, 2, 4, 8, rng.randrange(1, 200)))
    way = rng.randrange(7)
    if way == 0:
        changed[at] ^= 1 << rng.randrange(8)
    elif way == 1:
        changed[at : at + length] = rng.randbytes(min(length, len(changed) - at))
    elif way == 2:
        del changed[at : at + length]
    elif way == 3:
        changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
    elif way == 4:
        del changed[at:]
    elif way == 5:
        width = rng.choice("BHIQ")
        number = rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(width))
        packed = struct.pack(f"<{width}", number)
        changed[at : at + len(packed)] = packed
    else:
        other = corpus[rng.choice(sorted(corpus))]
        start = rng.randrange(len(other))
        changed[at : at + length] = other[start : start + length]
    return bytes(changed)


def _change_opcodes(data: bytes, rng: random.Random) -> bytes:
    """Change opcodes of the pickle that `data` starts with."""
    positions: list[int] = []
    try:
        # Torch's stream has three small pickles in front of the one with the tensors.
        start = 0
        for _ in range(rng.choice((1, 4)) if data[2:4] == b"\x8a\x0a" else 1):
            stream = io.BytesIO(data[start:])
            positions = [start + at for _, _, at in pickletools.genops(stream) if at is not None]
            start += stream.tell()
    except Exception:  # an earlier change broke it
        pass
    if len(positions) < 3:
        return data[: len(data) // 2]
    index = rng.randrange(len(positions) - 1)
    begin, end = positions[index], positions[index + 1]
    opcode = data[begin:end]
    way = rng.randrange(7)
    if way == 0:
        new = b""
    elif way == 1:
        new = opcode * rng.choice((2, 3, 1000))
    elif way == 2:
        new = rng.choice(HOSTILE)
    elif way == 3:
        new = opcode + rng.choice(HOSTILE)
    elif way == 4:
        new = bytes([rng.choice(b"()012NKMJ]}tlaesudRb\x81\x85\x86\x87\x88\x8f\x90\x91\x93\x94Q")])
    elif way == 5:
        other = rng.randrange(len(positions) - 1)
        new = data[positions[other] : positions[other + 1]]
    else:
        new = opcode[:1] + rng.randbytes(len(opcode) - 1)
    return data[:begin] + new + data[end:]


def _change_member(data: bytes, rng: random.Random) -> bytes:
    """Change one member of a zip file, or how it is stored, and keep the file whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:  # an earlier change broke it
        return data[: len(data) // 2]
    index = rng.randrange(len(members))
    if rng.random() < 0.6:
        index = next((i for i, (name, _) in enumerate(members) if name.endswith("data.pkl")), 0)
    name, content = members[index]
    way = rng.randrange(5)
    method = zipfile.ZIP_STORED
    if way == 0:
        name = rng.choice((f"../{name}", f"/{name}", name.upper(), members[0][0], f"{name}x"))
    elif way == 1:
        method = zipfile.ZIP_DEFLATED
    elif way == 2:
        content = content[: len(content) // 2]
    else:
        content = _change_opcodes(content, rng)
    members[index] = name, content
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return made.getvalue()


def _change_header(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON header of a safetensors file, and keep it consistent with its length."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return data[: len(data) // 2]
    key = rng.choice(sorted(header))
    entry = header[key] if isinstance(header[key], dict) else {}
    if rng.random() < 0.2:
        del header[key]
    elif entry:
        field = rng.choice(sorted(entry))
        values = (
            "",
            "F64",
            "F16",
            [],
            [1],
            [2**62, 4],
            [0, 2**60],
            None,
            3,
            {},
            "{}",
            "[]",
            "x" * 99,
        )
        entry[field] = rng.choice(values)
        if key == "__metadata__" and field in ("generator", "discriminator"):
            entry[field] = _change_config(header_text=data, field=field, size=size, rng=rng)
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + data[8 + size :]


def _change_config(header_text: bytes, field: str, size: int, rng: random.Random) -> str:
    text = json.loads(header_text[8 : 8 + size])["__metadata__"].get(field, "{}")
    try:
        config = json.loads(text)
        key = rng.choice(sorted(config))
    except (ValueError, IndexError, TypeError):
        return "{" * rng.choice((1, 1000, 100_000))
    config[key] = rng.choice((None, -1, 0, 2**40, 1e300, "x", [], {}, {"4": 1}, True, [0.0] * 4))
    return json.dumps(config)


_events: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching or event in HARMLESS:
        return
    if (event == "open" and _writes(*arguments[1:3])) or event.startswith(FORBIDDEN):
        _events.append(f"{event} {arguments}"[:200])


def _writes(mode: object, flags: object = 0) -> bool:
    """Whether a file is opened to be written, by `open` (a mode) or `os.open` (flags alone)."""
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _ring(_signal: int, frame: FrameType | None) -> None:
    if not _watching:
        return
    # Coverage, under which the tests run this, holds a lock in functions of its own, and would wait
    # for ever for one that an exception kept it from releasing.
    if frame is not None and frame.f_globals.get("__name__", "").startswith("coverage."):
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.001)
        return
    raise TooSlowError


@contextmanager
def watched() -> Iterator[list[str]]:
    """What happens in here that must not happen when a file is read."""
    global _watching
    if _watch not in _installed:
        sys.addaudithook(_watch)
        _installed.append(_watch)
    _events.clear()
    previous = signal.signal(signal.SIGVTALRM, _ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    _watching = True
    try:
        yield _events
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


_installed: list[object] = []


def judge(path: Path) -> tuple[str, str]:
    """Read a file: "read", "refused" or "failed", and what the reader said."""
    try:
        with watched() as events:
            checkpoint = convert(path, lambda _message: None)
            validate(checkpoint)
        outcome, said = "read", checkpoint.kind
    except LmexpError as fault:
        outcome, said = "refused", str(fault)
        if "\n" in said or len(said) > 700 or not said.isprintable():
            return "failed", f"not one line: {said!r}"
    except Exception:
        return "failed", traceback.format_exc()
    if events:
        return "failed", f"it did {events[0]}"
    return outcome, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--megabytes", type=int, default=1024, help="beyond what is in use at start"
    )
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"), help="failing cases")
    arguments = parser.parse_args()

    corpus = make_corpus()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case"
        for name, data in corpus.items():
            path.write_bytes(data)
            outcome, said = judge(path)
            # The first reading may import what this process had no need of yet.
            outcome, said = judge(path)
            if outcome != "read":
                print(f"{name}: the valid file is {outcome}: {said}")
                return 1
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + arguments.megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        counts: Counter[tuple[str, str]] = Counter()
        reasons: Counter[str] = Counter()
        slowest, number = 0.0, arguments.seed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = last = time.monotonic()
        while time.monotonic() - start < 60 * arguments.minutes:
            rng = random.Random(number)
            name = rng.choice(sorted(corpus))
            path.write_bytes(mutate(name, corpus[name], corpus, rng))
            began = time.monotonic()
            outcome, said = judge(path)
            slowest = max(slowest, time.monotonic() - began)
            counts[name, outcome] += 1
            if outcome == "refused":
                reasons[said.partition(": ")[2].partition(";")[0][:40]] += 1
            if outcome == "failed":
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / f"{name}-{number}").write_bytes(path.read_bytes())
                print(f"case {number} ({name}) failed:\n{said}", flush=True)
            number += 1
            if time.monotonic() - last > 60:
                last = time.monotonic()
                print(
                    f"{number - arguments.seed} cases after {(last - start) / 60:.0f} min",
                    flush=True,
                )
    for name in sorted(corpus):
        shown = ", ".join(f"{counts[name, way]} {way}" for way in ("read", "refused", "failed"))
        print(f"{name:24s}{shown}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    failed = sum(count for (_, way), count in counts.items() if way == "failed")
    print(
        f"{number - arguments.seed} cases, {len(reasons)} different reasons, {failed} failed; "
        f"slowest {slowest:.2f} s, {peak // 1024} MiB more at the peak"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
