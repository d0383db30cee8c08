"""A pickle interpreter that can't run anything.

Python's `pickle` is a machine that imports and calls what a file names; a filter in front of it
has to be perfect. This one knows some 50 opcodes, imports nothing and calls nothing but the
stand-ins that its reader hands over, of which `stand_ins.py` has about thirty. Opcodes that
torch, numpy and NVIDIA's tools never write (extension codes, `INST`, `OBJ`, `NEWOBJ_EX`, text
forms) are refused.

Time and memory are bounded: an opcode costs a constant, what a file may spend on opcodes in total
is bounded, byte strings are views of the file, and nothing is hashed, compared, copied or walked.

Source: the opcode table in CPython's `Lib/pickletools.py`; PEP 3154.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lmexp.checkpoints.refusal import RefusedError, show
from lmexp.checkpoints.values import Opaque, Record, Storage

MAX_OPCODES = 400_000
"""StyleGAN2-ADA's at 1024 px, with all three networks and the augmentation, takes 69,000."""

MAX_INTEGER = 16
"""Bytes of an integer; torch's magic number has ten."""


@dataclass
class Budget:
    """What is left for one file, nested pickles included; what lies in it twice is read twice.

    Attributes:
        opcodes: how many may still be executed.
        text: bytes of text that may still be decoded or encoded.
        binary: bytes that may still be made out of text (old pickles write bytes as text).
    """

    opcodes: int = MAX_OPCODES
    text: int = 0
    binary: int = 0

    def spend_opcodes(self, count: int) -> None:
        """Account for work that is not of constant cost as if it were `count` opcodes.

        Raises:
            RefusedError: there is too much of it.
        """
        self.opcodes -= count
        if self.opcodes < 0:
            raise RefusedError("its pickle has more opcodes than any network's")

    def spend_text(self, size: int) -> None:
        """Account for `size` bytes of text.

        Raises:
            RefusedError: there is too much of it.
        """
        self.text -= size
        if self.text < 0:
            raise RefusedError("its pickle reads more text than the file has")

    def spend_binary(self, size: int) -> None:
        """Account for `size` bytes made out of text.

        Raises:
            RefusedError: there is too much of it.
        """
        self.binary -= size
        if self.binary < 0:
            raise RefusedError("its pickle makes more bytes than the file has")


@dataclass(frozen=True, eq=False)
class StandIn:
    """What stands in place of a class or function that a file names.

    Attributes:
        name: the original's name.
        call: given the arguments, what a call of it leaves; None if it can't be called.
        new: the same for creating an object of it.
        value: what it is good for as an argument.
    """

    name: str
    call: Callable[[tuple[object, ...]], object] | None = None
    new: Callable[[tuple[object, ...]], object] | None = None
    value: object = None


Names = Mapping[tuple[str, str], StandIn]
FindStorage = Callable[[object], Storage]
Build = Callable[[object, object], bool]


_UNSIGNED = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}


class PickleReader:
    """Reads one pickle.

    Args:
        source: the file, or the part of it that holds the pickle.
        names: stand-ins by module and name; every other name is refused.
        budget: shared by all pickles of a file.
        build: given an object and its state, sets it and returns True, or returns False if the
            object takes none.
        find_storage: given a persistent id, the storage that it stands for; None: refuse them.
    """

    def __init__(
        self,
        source: memoryview,
        names: Names,
        budget: Budget,
        build: Build,
        find_storage: FindStorage | None = None,
    ) -> None:
        self._source = source
        self._names = names
        self._budget = budget
        self._build = build
        self._find_storage = find_storage
        self._at = 0
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._executed = 0

    def read(self, start: int = 0) -> tuple[object, int]:
        """The value, and where the pickle ends.

        Args:
            start: where it starts in `source`.

        Raises:
            RefusedError: it is damaged, or asks for anything but tensors and plain values.
        """
        self._at = start
        while True:
            self._budget.spend_opcodes(1)
            self._executed += 1
            opcode = self._byte()
            if opcode == 0x2E:  # STOP
                break
            execute = _OPCODES.get(opcode)
            if execute is None:
                raise RefusedError(
                    f"its pickle uses opcode {show(_NAMES.get(opcode, hex(opcode)))}, which no "
                    "network's needs",
                    "don't trust it, or fetch it again",
                )
            execute(self)
        if len(self._stack) != 1 or self._marks:
            raise RefusedError("its pickle ends in the middle", "fetch it again")
        return self._stack[0], self._at

    # Arguments

    def _take(self, size: int) -> memoryview:
        end = self._at + size
        if end > len(self._source):
            raise RefusedError("it is truncated", "fetch it again")
        taken = self._source[self._at : end]
        self._at = end
        return taken

    def _byte(self) -> int:
        if self._at >= len(self._source):
            raise RefusedError("it is truncated", "fetch it again")
        byte = self._source[self._at]
        self._at += 1
        return byte

    def _unsigned(self, size: int) -> int:
        number: int = struct.unpack(_UNSIGNED[size], self._take(size))[0]
        return number

    def _text(self, size: int) -> str:
        encoded = self._take(size)
        self._budget.spend_text(size)
        try:
            # Python's pickle writes lone surrogates this way.
            return str(encoded, "utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise RefusedError("its pickle holds text that is none", "fetch it again") from None

    def _line(self) -> str:
        limit = min(self._at + 256, len(self._source))
        end = bytes(self._source[self._at : limit]).find(b"\n")
        if end < 0:
            raise RefusedError("its pickle holds a name without an end", "fetch it again")
        text = self._text(end)
        self._at += 1
        return text

    # The stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        # Nothing below the last mark may be taken away: its values belong to a group.
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) <= floor:
            raise RefusedError("its pickle takes what it never stored", "fetch it again")
        return self._stack.pop()

    def _top(self) -> object:
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_group(self) -> list[object]:
        if not self._marks:
            raise RefusedError("its pickle ends a group that it never started", "fetch it again")
        start = self._marks.pop()
        group = self._stack[start:]
        del self._stack[start:]
        return group

    def _pop_tuple(self) -> tuple[object, ...]:
        arguments = self._pop()
        if not isinstance(arguments, tuple):
            raise RefusedError("its pickle calls with something that is no tuple")
        return arguments

    # Opcodes

    def frame(self) -> None:
        if self._unsigned(8) > len(self._source) - self._at:
            raise RefusedError("it is truncated", "fetch it again")

    def proto(self) -> None:
        version = self._byte()
        if not 2 <= version <= 5:
            raise RefusedError(f"its pickle is of protocol {version}, not 2 to 5")

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop(self) -> None:
        self._pop()

    def pop_mark(self) -> None:
        self._pop_group()

    def dup(self) -> None:
        self._push(self._top())

    def binint(self) -> None:
        self._push(struct.unpack("<i", self._take(4))[0])

    def long(self, width: int) -> None:
        size = self._unsigned(width)
        if size > MAX_INTEGER:
            raise RefusedError(f"its pickle holds an integer of {size} bytes")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def binfloat(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def extend_tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(values)))

    def group_tuple(self) -> None:
        self._push(tuple(self._pop_group()))

    def group_list(self) -> None:
        self._push(self._pop_group())

    def group_set(self) -> None:
        self._pop_group()
        self._push(Opaque("set"))

    def append(self) -> None:
        self._append_all([self._pop()])

    def appends(self) -> None:
        self._append_all(self._pop_group())

    def _append_all(self, values: list[object]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise RefusedError("its pickle appends to something that is no list")
        target.extend(values)

    def add_items(self) -> None:
        self._pop_group()
        if not isinstance(self._top(), Opaque):
            raise RefusedError("its pickle adds to something that is no set")

    def group_dict(self) -> None:
        values = self._pop_group()
        self._push(Record())
        self._set_all(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_all([key, value])

    def set_items(self) -> None:
        self._set_all(self._pop_group())

    def _set_all(self, values: list[object]) -> None:
        target = self._top()
        if not isinstance(target, Record):
            raise RefusedError("its pickle sets items of something that is no dictionary")
        if len(values) % 2:
            raise RefusedError("its pickle sets a key without a value", "fetch it again")
        target.pairs.extend(zip(values[::2], values[1::2], strict=True))

    def put(self, index: int) -> None:
        # Picklers number the memo from 0, so an index is below the number of opcodes before it.
        if index >= self._executed:
            raise RefusedError("its pickle numbers its memo as no pickler does")
        self._memo[index] = self._top()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def get(self, index: int) -> None:
        try:
            self._push(self._memo[index])
        except KeyError:
            raise RefusedError("its pickle takes what it never stored", "fetch it again") from None

    def find_global(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise RefusedError("its pickle imports something without a name")
        stand_in = self._names.get((module, name))
        if stand_in is None:
            raise RefusedError(
                f"its pickle asks for {show(module, 80)}.{show(name, 80)}, which is neither a "
                "tensor nor a plain value, so it was not read",
                "if you trust it, save its state_dict alone with the program that made it",
            )
        self._push(stand_in)

    def text_global(self) -> None:
        module = self._line()
        self.find_global(module, self._line())

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self.find_global(module, name)

    def reduce(self) -> None:
        arguments, function = self._pop_tuple(), self._pop()
        if not isinstance(function, StandIn) or function.call is None:
            raise RefusedError("its pickle calls something that is no function")
        self._push(function.call(arguments))

    def new_object(self) -> None:
        arguments, cls = self._pop_tuple(), self._pop()
        if not isinstance(cls, StandIn) or cls.new is None:
            raise RefusedError("its pickle makes an object of something that is no class")
        self._push(cls.new(arguments))

    def build(self) -> None:
        state = self._pop()
        if isinstance(state, Record):
            self._budget.spend_opcodes(len(state.pairs))
        if not self._build(self._top(), state):
            raise RefusedError("its pickle sets the state of something that has none")

    def persistent_id(self) -> None:
        if self._find_storage is None:
            raise RefusedError("its pickle refers to something outside of it")
        self._push(self._find_storage(self._pop()))


def _push_constant(value: object) -> Callable[[PickleReader], None]:
    return lambda reader: reader._push(value)


_OPCODES: dict[int, Callable[[PickleReader], None]] = {
    ord("("): PickleReader.mark,
    ord("0"): PickleReader.pop,
    ord("1"): PickleReader.pop_mark,
    ord("2"): PickleReader.dup,
    ord("N"): _push_constant(None),
    0x88: _push_constant(True),
    0x89: _push_constant(False),
    ord("J"): PickleReader.binint,
    ord("K"): lambda reader: reader._push(reader._unsigned(1)),
    ord("M"): lambda reader: reader._push(reader._unsigned(2)),
    0x8A: lambda reader: reader.long(1),
    0x8B: lambda reader: reader.long(4),
    ord("G"): PickleReader.binfloat,
    ord("X"): lambda reader: reader._push(reader._text(reader._unsigned(4))),
    0x8C: lambda reader: reader._push(reader._text(reader._unsigned(1))),
    0x8D: lambda reader: reader._push(reader._text(reader._unsigned(8))),
    ord("B"): lambda reader: reader._push(reader._take(reader._unsigned(4))),
    ord("C"): lambda reader: reader._push(reader._take(reader._unsigned(1))),
    0x8E: lambda reader: reader._push(reader._take(reader._unsigned(8))),
    0x96: lambda reader: reader._push(reader._take(reader._unsigned(8))),
    ord(")"): _push_constant(()),
    0x85: lambda reader: reader.extend_tuple(1),
    0x86: lambda reader: reader.extend_tuple(2),
    0x87: lambda reader: reader.extend_tuple(3),
    ord("t"): PickleReader.group_tuple,
    ord("]"): lambda reader: reader._push([]),
    ord("l"): PickleReader.group_list,
    ord("a"): PickleReader.append,
    ord("e"): PickleReader.appends,
    ord("}"): lambda reader: reader._push(Record()),
    ord("d"): PickleReader.group_dict,
    ord("s"): PickleReader.set_item,
    ord("u"): PickleReader.set_items,
    0x8F: lambda reader: reader._push(Opaque("set")),
    0x90: PickleReader.add_items,
    0x91: PickleReader.group_set,
    ord("q"): lambda reader: reader.put(reader._unsigned(1)),
    ord("r"): lambda reader: reader.put(reader._unsigned(4)),
    0x94: PickleReader.memoize,
    ord("h"): lambda reader: reader.get(reader._unsigned(1)),
    ord("j"): lambda reader: reader.get(reader._unsigned(4)),
    ord("c"): PickleReader.text_global,
    0x93: PickleReader.stack_global,
    ord("R"): PickleReader.reduce,
    0x81: PickleReader.new_object,
    ord("b"): PickleReader.build,
    ord("Q"): PickleReader.persistent_id,
    0x80: PickleReader.proto,
    0x95: PickleReader.frame,
}

_NAMES = {
    ord("P"): "PERSID",
    ord("i"): "INST",
    ord("o"): "OBJ",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
    ord("I"): "INT",
    ord("L"): "LONG",
    ord("F"): "FLOAT",
    ord("S"): "STRING",
    ord("T"): "BINSTRING",
    ord("U"): "SHORT_BINSTRING",
    ord("V"): "UNICODE",
    ord("g"): "GET",
    ord("p"): "PUT",
}
