"""Read the constants of an OpenVINO IR network (xml + bin) without OpenVINO.

Only what weight conversion needs: the layers, what feeds what, and every Const as a
NumPy array. Nothing is executed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from lmexp.errors import LmexpError

_DTYPES: dict[str, np.dtype[Any]] = {
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
    "f64": np.dtype("<f8"),
    "i8": np.dtype("i1"),
    "u8": np.dtype("u1"),
    "i32": np.dtype("<i4"),
    "i64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class Layer:
    """One node of the graph.

    Attributes:
        type: OpenVINO's operation name, e.g. "Convolution".
        name: the name in the file; PyTorch's parameter name where the exporter kept it.
        inputs: identifiers of the layers that feed it, in the order of its ports.
        value: the constant's value, for a Const; otherwise None.
    """

    type: str
    name: str
    inputs: tuple[str, ...]
    value: NDArray[np.generic] | None


class Graph:
    """Layers of one IR network by identifier, in the file's (topological) order.

    Args:
        xml: content of the .xml file.
        blob: content of the .bin file.
        source: what to call the network in messages.

    Raises:
        LmexpError: the xml is not an IR network, or a constant does not fit its shape or
            lies outside the blob (a truncated download).
    """

    def __init__(self, xml: bytes, blob: bytes, source: str) -> None:
        self.source = source
        try:
            root = ElementTree.fromstring(xml)
        except ElementTree.ParseError as error:
            raise LmexpError(
                f"{source}: not valid xml ({error}); fetch the weights again"
            ) from error
        layers, edges = root.find("layers"), root.find("edges")
        if root.tag != "net" or layers is None or edges is None:
            raise LmexpError(f"{source}: not an OpenVINO IR network; fetch the weights again")

        feeds: dict[str, list[tuple[int, str]]] = {}
        for edge in edges:
            feeds.setdefault(edge.attrib["to-layer"], []).append(
                (int(edge.attrib["to-port"]), edge.attrib["from-layer"])
            )
        self.layers: dict[str, Layer] = {}
        for element in layers:
            identifier = element.attrib["id"]
            self.layers[identifier] = Layer(
                type=element.attrib["type"],
                name=element.attrib["name"],
                inputs=tuple(origin for _, origin in sorted(feeds.get(identifier, []))),
                value=self._read_constant(element, blob),
            )

    def _read_constant(
        self, element: ElementTree.Element, blob: bytes
    ) -> NDArray[np.generic] | None:
        if element.attrib["type"] != "Const":
            return None
        name, data = element.attrib["name"], element.find("data")
        if data is None:
            raise LmexpError(f"{self.source}: constant {name} has no data; fetch the weights again")
        element_type = data.attrib["element_type"]
        if element_type not in _DTYPES:
            raise LmexpError(
                f"{self.source}: constant {name} has element type {element_type}, "
                f"which is not one of {', '.join(_DTYPES)}; use the release named in the registry"
            )
        dtype = _DTYPES[element_type]
        shape = tuple(int(side) for side in data.attrib["shape"].split(",") if side.strip())
        offset, size = int(data.attrib["offset"]), int(data.attrib["size"])
        count = math.prod(shape)
        if size != count * dtype.itemsize:
            raise LmexpError(
                f"{self.source}: constant {name} has {size} bytes where its shape {shape} needs "
                f"{count * dtype.itemsize}; fetch the weights again"
            )
        if offset < 0 or offset + size > len(blob):
            raise LmexpError(
                f"{self.source}: constant {name} ends at byte {offset + size} of {len(blob)} "
                "(truncated file); fetch the weights again"
            )
        return np.frombuffer(blob, dtype, count, offset).reshape(shape)

    def consumer(self, identifier: str) -> str:
        """The one layer that reads `identifier`.

        Raises:
            LmexpError: there is none, or there are several.
        """
        readers = [key for key, layer in self.layers.items() if identifier in layer.inputs]
        if len(readers) != 1:
            raise LmexpError(
                f"{self.source}: {self.layers[identifier].name} feeds {len(readers)} layers where "
                "one is expected; use the release named in the registry"
            )
        return readers[0]

    def constants(self) -> Iterator[tuple[str, Layer]]:
        """(identifier, layer) of every constant, in the file's order."""
        return ((key, layer) for key, layer in self.layers.items() if layer.value is not None)

    def find(self, name: str) -> str:
        """Identifier of the constant called `name`.

        Raises:
            LmexpError: there is no such constant.
        """
        for key, layer in self.constants():
            if layer.name == name:
                return key
        raise LmexpError(
            f"{self.source}: no constant called {name}; use the release named in the registry"
        )

    def constant_input(self, identifier: str) -> tuple[NDArray[np.generic], str]:
        """Split a binary layer into (its constant operand, identifier of the other operand).

        Raises:
            LmexpError: the layer does not have exactly one constant operand of two.
        """
        layer = self.layers[identifier]
        values = [self.layers[key].value for key in layer.inputs]
        if len(values) == 2:
            first, second = values
            if first is None and second is not None:
                return second, layer.inputs[0]
            if first is not None and second is None:
                return first, layer.inputs[1]
        raise LmexpError(
            f"{self.source}: {layer.type} {layer.name} does not join one constant and one "
            "activation; use the release named in the registry"
        )
