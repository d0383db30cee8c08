"""The OpenVINO IR reader, on networks written here byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmexp.errors import LmexpError
from lmexp.weights.openvino_ir import Graph

BLOB = np.array([1, 2, 3, 4, 5, 6], "<f4").tobytes() + np.array([7, 8], "<i8").tobytes()


def const(
    identifier: int, name: str, shape: str, offset: int, size: int, element_type: str = "f32"
) -> str:
    return (
        f'<layer id="{identifier}" name="{name}" type="Const"><data element_type="{element_type}" '
        f'shape="{shape}" offset="{offset}" size="{size}"/></layer>'
    )


def network(*layers: str, edges: str = "") -> bytes:
    return f"<net><layers>{''.join(layers)}</layers><edges>{edges}</edges></net>".encode()


def edge(origin: int, target: int, port: int) -> str:
    return f'<edge from-layer="{origin}" from-port="0" to-layer="{target}" to-port="{port}"/>'


def graph(xml: bytes, blob: bytes = BLOB) -> Graph:
    return Graph(xml, blob, "net")


ADD = '<layer id="2" name="add" type="Add"/>'
INPUT = '<layer id="3" name="x" type="Parameter"/>'


def test_constants_have_their_values_shapes_and_types() -> None:
    read = graph(network(const(0, "a", "2, 3", 0, 24), const(1, "b", "2", 24, 16, "i64")))
    values = {layer.name: layer.value for _, layer in read.constants()}
    assert values["a"] is not None and values["b"] is not None
    np.testing.assert_array_equal(values["a"], np.arange(1, 7, dtype="f4").reshape(2, 3))
    np.testing.assert_array_equal(values["b"], [7, 8])
    assert (values["a"].dtype, values["b"].dtype) == (np.dtype("f4"), np.dtype("i8"))


def test_scalars_have_no_axes() -> None:
    (_, layer), *_ = graph(network(const(0, "a", "", 4, 4))).constants()
    assert layer.value is not None and layer.value.shape == () and layer.value == 2


def test_walks_by_port_not_by_order_in_the_file() -> None:
    xml = network(const(0, "a", "1", 0, 4), ADD, INPUT, edges=edge(3, 2, 1) + edge(0, 2, 0))
    read = graph(xml)
    assert read.layers["2"].inputs == ("0", "3")
    assert read.consumer("0") == "2"
    value, other = read.constant_input("2")
    assert value == 1 and other == "3"


@pytest.mark.parametrize("ports", [(0, 1), (1, 0)])
def test_constant_operand_on_either_side(ports: tuple[int, int]) -> None:
    edges = edge(0, 2, ports[0]) + edge(3, 2, ports[1])
    assert graph(network(const(0, "a", "1", 0, 4), ADD, INPUT, edges=edges)).constant_input("2")[
        1
    ] == ("3")


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (b"<net><layers>", "not valid xml"),
        (b"\x89PNG", "not valid xml"),
        (b"<html/>", "not an OpenVINO IR network"),
        (b"<net><layers/></net>", "not an OpenVINO IR network"),
        (network(const(0, "a", "2, 3", 0, 20)), "has 20 bytes where its shape"),
        (network(const(0, "a", "2, 3", 40, 24)), "truncated file"),
        (network(const(0, "a", "1", -4, 4)), "truncated file"),
        (network(const(0, "a", "1", 0, 4, "bf16")), "element type bf16"),
        (network('<layer id="0" name="a" type="Const"/>'), "has no data"),
    ],
)
def test_bad_files_are_refused_in_one_line(xml: bytes, reason: str) -> None:
    with pytest.raises(LmexpError, match=reason) as caught:
        graph(xml)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("net: ")


@given(cut=st.integers(0, len(BLOB) - 1))
def test_every_truncation_is_noticed(cut: int) -> None:
    xml = network(const(0, "a", "2, 3", 0, 24), const(1, "b", "2", 24, 16, "i64"))
    with pytest.raises(LmexpError, match="truncated file"):
        graph(xml, BLOB[:cut])


def test_unexpected_structure_is_refused() -> None:
    read = graph(network(const(0, "a", "1", 0, 4), ADD, INPUT, edges=edge(3, 2, 0)))
    with pytest.raises(LmexpError, match="a feeds 0 layers"):
        read.consumer("0")
    with pytest.raises(LmexpError, match="does not join one constant"):
        read.constant_input("2")
    with pytest.raises(LmexpError, match="no constant called b"):
        read.find("b")
