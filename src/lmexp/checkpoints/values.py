"""What a checkpoint's pickle may turn into: plain values, and the inert records below.

Nothing here has behaviour that a file could steer: a mapping is a list of pairs that is never
hashed while the file is read (so keys can't be made to collide), an object is a record of its
state, a tensor is a claim on a part of the file that is checked when it is made and read when it
is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmexp.checkpoints.refusal import RefusedError, show

MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**40
MAX_PAIRS = 4096
"""Entries of a dictionary that is looked into; a 1024 px generator has 250 tensors."""


class Record:
    """A dictionary, or an object in place of which only its state is kept.

    Attributes:
        kind: what it stands for: "dict", "EasyDict", "Namespace", "Network", or the class that a
            persistence record names.
        pairs: keys and values in the file's order; keys may be any value and may repeat.
        state: the object's attributes, None if the file sets none.
    """

    __slots__ = ("kind", "pairs", "state")

    def __init__(self, kind: str = "dict", state: Record | None = None) -> None:
        self.kind = kind
        self.pairs: list[tuple[object, object]] = []
        self.state = state

    def fields(self) -> dict[str, object]:
        """Pairs whose key is a string; the last of equal keys counts, as in any dictionary.

        Raises:
            RefusedError: there are more than any network has.
        """
        if len(self.pairs) > MAX_PAIRS:
            raise RefusedError(f"a dictionary in it has {len(self.pairs)} entries")
        return {key: value for key, value in self.pairs if isinstance(key, str)}

    def attributes(self) -> dict[str, object]:
        """The object's attributes by name."""
        return self.state.fields() if self.state is not None else {}


class Opaque:
    """A harmless value that this program has no use for, such as a path or a device."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass(eq=False)
class ElementType:
    """A storage's or an array's element type: a numpy type string, or "bf16"."""

    code: str

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 2 if self.code == "bf16" else np.dtype(self.code).itemsize


@dataclass(eq=False)
class Storage:
    """A run of equal elements in the file.

    Attributes:
        element: their type.
        count: how many the file claims.
        data: the bytes, a view of the file; None as long as a stream has not come to them.
    """

    element: ElementType
    count: int
    data: memoryview | None = None

    def fill(self, data: memoryview) -> None:
        """Give it its bytes.

        Raises:
            RefusedError: their number is not what was claimed.
        """
        if len(data) != self.count * self.element.size:
            raise RefusedError(
                f"a storage of {self.count} elements has {len(data)} bytes", "fetch it again"
            )
        self.data = data


@dataclass(eq=False)
class StoredTensor:
    """A tensor that was checked but not read yet.

    Attributes:
        storage: where its elements lie.
        offset: its first element.
        shape: its shape.
        strides: elements from one index to the next, for each dimension.

    Raises:
        RefusedError: it reaches beyond its storage, or repeats elements.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (self.offset, *self.shape, *self.strides)
        if not (len(self.shape) == len(self.strides) <= MAX_DIMENSIONS) or not all(
            type(size) is int and 0 <= size < MAX_ELEMENTS for size in sizes
        ):
            raise RefusedError("a tensor has an impossible shape")
        count = math.prod(self.shape)
        last = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )
        # More elements than the storage has means that a small file claims a large tensor.
        if count > self.storage.count or (count and last >= self.storage.count):
            raise RefusedError(
                f"a tensor of shape {list(self.shape)} reaches beyond its storage of "
                f"{self.storage.count} elements"
            )

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """A contiguous float32 copy, whatever its floating-point type in the file.

        Raises:
            RefusedError: it has no bytes, or no floating-point ones.
        """
        storage = self.storage
        code = storage.element.code
        if storage.data is None:
            raise RefusedError("a storage is missing", "fetch it again")
        if code != "bf16" and np.dtype(code).kind != "f":
            raise RefusedError(f"a weight has elements of type {code}, not floating-point ones")
        raw = np.frombuffer(storage.data, dtype="<u2" if code == "bf16" else code)
        view = np.lib.stride_tricks.as_strided(
            raw[self.offset :] if self.count else raw[:0],
            self.shape,
            tuple(stride * raw.itemsize for stride in self.strides),
        )
        if code == "bf16":
            bits = np.array(view, dtype=np.uint32, order="C") << np.uint32(16)
            return torch.from_numpy(bits.view(np.float32))
        # A double that float32 can't hold becomes infinite, and is refused as such later.
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.array(view, dtype=np.float32, order="C"))


def require_record(value: object, name: str) -> Record:
    """`value` if it is a record.

    Raises:
        RefusedError: it is something else.
    """
    if not isinstance(value, Record):
        raise RefusedError(f"{show(name)} is no dictionary or object")
    return value


def require_tensor(value: object, name: str) -> StoredTensor:
    """`value` if it is a tensor.

    Raises:
        RefusedError: it is something else.
    """
    if not isinstance(value, StoredTensor):
        raise RefusedError(f"{show(name)} is no tensor")
    return value
