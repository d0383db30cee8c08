"""The names that a checkpoint's pickle may mention, and what stands in their place.

Nothing is imported or looked up by a name out of a file: a name is a key of `names_for`'s
dictionary or the file is refused. What a name stands for is code of this project that makes
records of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable

from lmexp.checkpoints.pickles import Budget, Names, StandIn
from lmexp.checkpoints.refusal import RefusedError, show
from lmexp.checkpoints.values import (
    MAX_DIMENSIONS,
    ElementType,
    Opaque,
    Record,
    Storage,
    StoredTensor,
)

LoadBytes = Callable[[memoryview], Storage]

MAX_NAME = 100
"""Letters of a class's name."""

_TORCH_ELEMENTS = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
_NUMPY_ELEMENTS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class ArrayType(ElementType):
    """A numpy type, whose byte order its pickled state tells."""


class Array(StoredTensor):
    """A numpy array, which its pickled state fills."""


def names_for(budget: Budget, load_bytes: LoadBytes | None) -> Names:
    """Stand-ins by module and name.

    Args:
        budget: of the file that is read.
        load_bytes: reads a storage that lies in the pickle as a byte string; None: refuse those.
    """

    def encode(arguments: tuple[object, ...]) -> object:
        if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
            raise RefusedError("its pickle encodes text in a way that numpy and torch don't")
        budget.spend_binary(len(arguments[0]))
        try:
            return memoryview(arguments[0].encode("latin-1"))
        except UnicodeEncodeError:
            raise RefusedError("its pickle holds bytes that are none", "fetch it again") from None

    def load_storage(arguments: tuple[object, ...]) -> object:
        (data,) = _expect(arguments, 1)
        if load_bytes is None or not isinstance(data, memoryview):
            raise RefusedError("its pickle holds a storage in a storage")
        return load_bytes(data)

    def rebuild_persistent(arguments: tuple[object, ...]) -> object:
        return _rebuild_persistent(arguments, budget)

    names = dict(_FIXED)
    for stand_in in (
        StandIn("_codecs.encode", call=encode),
        StandIn("torch.storage._load_from_bytes", call=load_storage),
        StandIn("torch_utils.persistence._reconstruct_persistent_obj", call=rebuild_persistent),
    ):
        module, _, name = stand_in.name.rpartition(".")
        names[module, name] = stand_in
    return names


def set_state(target: object, state: object) -> bool:
    """Give an object the state that its pickle holds; False if it takes none.

    Raises:
        RefusedError: the state is not what such an object's pickle holds.
    """
    if isinstance(target, Array):
        _fill_array(target, state)
    elif isinstance(target, ArrayType):
        _set_byte_order(target, state)
    elif isinstance(target, Record) and target.kind != "dict" and isinstance(state, Record):
        target.state = _require_plain_names(state)
    else:
        return False
    return True


def _require_plain_names(state: Record) -> Record:
    for name, _ in state.pairs:
        if not isinstance(name, str) or name.startswith("__"):
            raise RefusedError(f"its pickle sets the attribute {show(name)} of an object")
    return state


def _expect(arguments: tuple[object, ...], least: int, most: int | None = None) -> list[object]:
    if not least <= len(arguments) <= (least if most is None else most):
        raise RefusedError("its pickle calls with arguments that torch and numpy don't use")
    return list(arguments)


def _sizes(value: object) -> tuple[int, ...]:
    fits = isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS
    if not isinstance(value, tuple) or not fits or not all(type(size) is int for size in value):
        raise RefusedError("a tensor has an impossible shape")
    return value


def _rebuild_tensor(arguments: tuple[object, ...]) -> object:
    storage, offset, shape, strides = _expect(arguments, 4, 7)[:4]
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise RefusedError("a tensor has no storage")
    return StoredTensor(storage, offset, _sizes(shape), _sizes(strides))


def _rebuild_parameter(arguments: tuple[object, ...]) -> object:
    tensor = _expect(arguments, 3, 4)[0]
    if not isinstance(tensor, StoredTensor):
        raise RefusedError("a parameter has no tensor")
    return tensor


def _make_type(arguments: tuple[object, ...]) -> object:
    code = _expect(arguments, 1, 3)[0]
    if not isinstance(code, str) or code not in _NUMPY_ELEMENTS:
        raise RefusedError(f"an array has elements of type {show(code)}, which are no numbers")
    return ArrayType(f"<{code}")


def _set_byte_order(element: ArrayType, state: object) -> None:
    if not (isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", ">", "|", "=")):
        raise RefusedError("an array's type has a state that numpy does not write")
    if any(part is not None for part in state[2:5]):
        raise RefusedError("an array has elements of a compound type, which are no numbers")
    element.code = (">" if state[1] == ">" else "<") + element.code[1:]


def _start_array(arguments: tuple[object, ...]) -> object:
    _expect(arguments, 3)
    return Array(Storage(ElementType("|u1"), 0, memoryview(b"")), 0, (0,), (1,))


def _fill_array(array: Array, state: object) -> None:
    if not isinstance(state, tuple) or len(state) != 5:
        raise RefusedError("an array has a state that numpy does not write")
    _, shape, element, by_columns, data = state
    _place(array, shape, element, data, by_columns is True)


def _place(array: Array, shape: object, element: object, data: object, by_columns: bool) -> None:
    if not isinstance(element, ArrayType) or not isinstance(data, memoryview):
        raise RefusedError("an array holds something else than numbers")
    sizes = _sizes(shape)
    if len(data) % element.size:
        raise RefusedError("an array's bytes are no whole elements", "fetch it again")
    # The type may get another byte order later on; this array keeps the one that it has.
    storage = Storage(ElementType(element.code), len(data) // element.size, data)
    strides, step = [], 1
    for size in sizes if by_columns else reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    array.storage, array.offset, array.shape = storage, 0, sizes
    array.strides = tuple(strides if by_columns else reversed(strides))
    array.__post_init__()
    if array.count != storage.count:
        raise RefusedError("an array has more bytes than elements", "fetch it again")


def _read_scalar(arguments: tuple[object, ...]) -> object:
    element, data = _expect(arguments, 2)
    scalar = _start_array((None, None, None))
    assert isinstance(scalar, Array)
    _place(scalar, (), element, data, False)
    return scalar


def _read_buffer(arguments: tuple[object, ...]) -> object:
    data, element, shape, order = _expect(arguments, 4)
    array = _start_array((None, None, None))
    assert isinstance(array, Array)
    _place(array, shape, element, data, order == "F")
    return array


def _keep_size(arguments: tuple[object, ...]) -> object:
    return _sizes(_expect(arguments, 1)[0])


def _rebuild_persistent(arguments: tuple[object, ...], budget: Budget) -> object:
    """An object of NVIDIA's `torch_utils.persistence`; the source text in it is left alone."""
    (meta,) = _expect(arguments, 1)
    fields: dict[str, object] = {}
    if isinstance(meta, Record):
        budget.spend_opcodes(len(meta.pairs))
        fields = meta.fields()
    state, name = fields.get("state"), fields.get("class_name")
    fits = isinstance(name, str) and len(name) <= MAX_NAME and isinstance(state, Record)
    if fields.get("type") != "class" or not fits or not isinstance(state, Record):
        raise RefusedError("a persistence record is incomplete", "fetch it again")
    budget.spend_opcodes(len(state.pairs))
    return Record(f"persistent {name}", _require_plain_names(state))


def _record(name: str, kind: str | None = None) -> StandIn:
    def make(arguments: tuple[object, ...]) -> object:
        _expect(arguments, 0)
        return Record(kind or name.rpartition(".")[2])

    return StandIn(name, call=make, new=make)


def _opaque(name: str) -> StandIn:
    def make(_arguments: tuple[object, ...]) -> object:
        return Opaque(name)

    return StandIn(name, call=make, new=make)


def _all_fixed() -> dict[tuple[str, str], StandIn]:
    multiarray = ("numpy.core.multiarray", "numpy._core.multiarray")
    stand_ins = [
        _record("collections.OrderedDict"),
        _record("argparse.Namespace"),
        _record("dnnlib.util.EasyDict"),
        _record("dnnlib.EasyDict"),
        _record("dnnlib.tflib.network.Network"),
        StandIn("torch._utils._rebuild_tensor", call=_rebuild_tensor),
        StandIn("torch._utils._rebuild_tensor_v2", call=_rebuild_tensor),
        StandIn("torch._utils._rebuild_parameter", call=_rebuild_parameter),
        StandIn("torch._utils._rebuild_parameter_with_state", call=_rebuild_parameter),
        StandIn("torch.Size", call=_keep_size),
        _opaque("torch.device"),
        _opaque("pathlib.Path"),
        _opaque("pathlib.PosixPath"),
        _opaque("pathlib.WindowsPath"),
        _opaque("builtins.set"),
        _opaque("__builtin__.set"),
        StandIn("numpy.ndarray"),
        StandIn("numpy.dtype", call=_make_type),
        *(StandIn(f"{module}._reconstruct", call=_start_array) for module in multiarray),
        *(StandIn(f"{module}.scalar", call=_read_scalar) for module in multiarray),
        StandIn("numpy.core.numeric._frombuffer", call=_read_buffer),
        StandIn("numpy._core.numeric._frombuffer", call=_read_buffer),
    ]
    stand_ins += [
        StandIn(f"{module}.{name}", value=ElementType(code))
        for module in ("torch", "torch.cuda")
        for name, code in _TORCH_ELEMENTS.items()
    ]
    names = {}
    for stand_in in stand_ins:
        module, _, name = stand_in.name.rpartition(".")
        names[module, name] = stand_in
    return names


_FIXED = _all_fixed()
