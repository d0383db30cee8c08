"""Converters on small files of the packages' formats, and the real mapping's structure."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lmexp.errors import LmexpError
from lmexp.weights import store
from lmexp.weights.converters import (
    HED_LAYERS,
    convert_hed_vgg16,
    convert_mobile_stylegan,
    convert_stlpips,
)


def checkpoint(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def keras_file(layers: tuple[tuple[str, str, str], ...] = HED_LAYERS) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for number, (block, layer, _) in enumerate(layers):
            variables = file.create_group(f"{block}/layers/{layer}/vars")
            kernel = np.arange(3 * 3 * 2 * 4, dtype="f4").reshape(3, 3, 2, 4) + number
            variables["0"] = kernel
            variables["1"] = np.full(4, number, "f4")
    return buffer.getvalue()


def test_stlpips_keeps_names_and_values() -> None:
    state = {"net.slice1.0.weight": torch.randn(2, 3), "lin0.model.1.weight": torch.randn(1, 4)}
    converted = convert_stlpips({"x.pth": checkpoint(state)})
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)


class Surprise:
    """Pickles to a call; a loader that ran it would be a way in."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("never"),))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a readable checkpoint"),
        (b"not a pickle", "not a readable checkpoint"),
        (checkpoint({"a": torch.zeros(50)})[:-200], "not a readable checkpoint"),
        (checkpoint(Surprise()), "not a readable checkpoint"),
        (checkpoint([torch.zeros(1)]), "not a state dict"),
        (checkpoint({"a": 1}), "not a state dict"),
    ],
)
def test_stlpips_refuses_what_is_no_state_dict(content: bytes, reason: str) -> None:
    with pytest.raises(LmexpError, match=reason) as caught:
        convert_stlpips({"x.pth": content})
    assert "\n" not in str(caught.value)
    assert not Path("never").exists()


def test_hed_kernels_become_output_first() -> None:
    converted = convert_hed_vgg16({"x.h5": keras_file()})
    assert len(converted) == 26
    assert converted["conv1_1.weight"].shape == (4, 2, 3, 3)
    # Keras' [height 1, width 2, input 1, output 3] is ours [3, 1, 1, 2].
    assert converted["conv1_1.weight"][3, 1, 1, 2] == ((1 * 3 + 2) * 2 + 1) * 4 + 3
    assert converted["conv5_3.bias"].tolist() == [12.0] * 4
    assert all(tensor.is_contiguous() for tensor in converted.values())


@pytest.mark.parametrize("content", [b"", b"nothing", keras_file(HED_LAYERS[:-1])])
def test_hed_refuses_other_files(content: bytes) -> None:
    with pytest.raises(LmexpError, match="not the expected Keras file") as caught:
        convert_hed_vgg16({"x.h5": content})
    assert "\n" not in str(caught.value)


def test_hed_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    content = keras_file()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(LmexpError, match="pip install h5py"):
        convert_hed_vgg16({"x.h5": content})


class Exporter:
    """Writes an IR network as the wheel's exporter did: names lost where it folded."""

    def __init__(self) -> None:
        self.blob = b""
        self.layers: list[str] = []
        self.edges: list[str] = []

    def add(self, kind: str, name: str, inputs: tuple[int, ...] = (), data: str = "") -> int:
        number = len(self.layers)
        self.layers.append(f'<layer id="{number}" name="{name}" type="{kind}">{data}</layer>')
        for port, origin in enumerate(inputs):
            self.edges.append(
                f'<edge from-layer="{origin}" from-port="0" to-layer="{number}" to-port="{port}"/>'
            )
        return number

    def constant(self, name: str, value: np.ndarray) -> int:
        shape = ", ".join(map(str, value.shape))
        data = (
            f'<data element_type="f32" shape="{shape}" offset="{len(self.blob)}" '
            f'size="{value.nbytes}"/>'
        )
        self.blob += value.astype("<f4").tobytes()
        return self.add("Const", name, data=data)

    @property
    def xml(self) -> bytes:
        body = f"<layers>{''.join(self.layers)}</layers><edges>{''.join(self.edges)}</edges>"
        return f"<net>{body}</net>".encode()


def test_mobile_stylegan_finds_the_constants_that_lost_their_names() -> None:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype("f4")

    mapping, synthesis, expected = Exporter(), Exporter(), {}
    mapping.constant("171", draw(1, 1))
    for index, number in enumerate((173, 177)):
        weight, bias = draw(3, 3), draw(3)
        mapping.constant(str(number), weight)
        mapping.constant(str(number + 1), bias)
        expected |= {f"mapping.{index}.weight": weight, f"mapping.{index}.bias": bias}
    expected["input"] = draw(1, 4, 4, 4)
    constant = synthesis.constant("m.input.input", expected["input"])
    x = synthesis.add("Multiply", "modulated", (constant, synthesis.add("Parameter", "style")))
    for name, shape in (
        ("conv1", (4, 4, 3, 3)),
        ("layers.0.conv1", (8, 4, 1, 1)),
        ("layers.0.to_img", (12, 8, 1, 1)),
    ):
        style, style_bias, weight = draw(shape[1], 3), draw(shape[1]), draw(*shape)
        synthesis.constant(f"m.{name}.conv.modulation.weight", style)
        synthesis.constant(f"m.{name}.conv.modulation.bias", style_bias[None])
        expected |= {f"{name}.modulation.weight": style, f"{name}.modulation.bias": style_bias}
        if name == "layers.0.conv1":
            depthwise = draw(4, 1, 3, 3)
            kernel = synthesis.constant(f"m.{name}.conv.weight_dw", depthwise[:, None])
            x = synthesis.add("GroupConvolution", "dw", (x, kernel))
            expected[f"{name}.depthwise"] = depthwise
        named = name == "layers.0.to_img"
        kernel = synthesis.constant(f"m.{name}.conv.weight" if named else "Mul_9_copy", weight)
        x = synthesis.add("Convolution", f"{name}/conv", (x, kernel))
        if not named:
            noise = draw(1, 1, 4, 4)
            x = synthesis.add("Add", f"{name}/noise", (x, synthesis.constant("1531", noise)))
            expected[f"{name}.noise"] = noise
        bias = draw(shape[0])
        constant = synthesis.constant(f"m.{name}.bias", bias.reshape(1, -1, 1, 1))
        x = synthesis.add("Add", f"{name}/bias", (x, constant))
        expected |= {f"{name}.weight": weight, f"{name}.bias": bias}
    synthesis.constant("m.layers.0.up.modulation.weight", draw(4, 3))
    expected["layers.0.up.modulation.weight"] = np.frombuffer(synthesis.blob[-48:], "<f4").reshape(
        4, 3
    )
    folder = "random_face/data/"
    converted = convert_mobile_stylegan(
        {
            f"{folder}MappingNetwork.xml": mapping.xml,
            f"{folder}MappingNetwork.bin": mapping.blob,
            f"{folder}SynthesisNetwork.xml": synthesis.xml,
            f"{folder}SynthesisNetwork.bin": synthesis.blob,
        }
    )
    assert converted.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(converted[name].numpy(), value, err_msg=name)


def test_mobile_stylegan_needs_its_layers() -> None:
    empty = b"<net><layers/><edges/></net>"
    folder = "random_face/data/"
    members = {
        f"{folder}{name}.{suffix}": empty if suffix == "xml" else b""
        for name in ("MappingNetwork", "SynthesisNetwork")
        for suffix in ("xml", "bin")
    }
    with pytest.raises(LmexpError, match="0 matrices and 0 biases"):
        convert_mobile_stylegan(members)


def test_mobile_stylegan_has_every_tensor() -> None:
    tensors = store.load("mobile_stylegan_ffhq").tensors
    assert sum(name.startswith("mapping.") for name in tensors) == 16
    separable = [name for name in tensors if name.endswith(".depthwise")]
    assert len(separable) == 14
    for name in separable:
        stem = name.removesuffix(".depthwise")
        # Each convolution reads as many channels as its style scales, and fills its noise map.
        channels = tensors[f"{stem}.modulation.weight"].shape[0]
        assert tensors[name].shape == (channels, 1, 3, 3)
        assert tensors[f"{stem}.weight"].shape[1] == channels
        block = int(stem.split(".")[1])
        assert tensors[f"{stem}.noise"].shape == (1, 1, 8 * 2**block, 8 * 2**block)
