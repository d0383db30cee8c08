"""Converters on small files of the packages' formats, and the real mapping's structure."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import h5py
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lmexp.errors import LmexpError
from lmexp.weights import store
from lmexp.weights.converters import (
    HED_LAYERS,
    SFACE_CONVOLUTIONS,
    convert_hed_vgg16,
    convert_mobile_stylegan,
    convert_sface,
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


WIDTH, ANSWERS = 2, 3


def onnx_file(
    convolutions: tuple[str, ...] = SFACE_CONVOLUTIONS, block: int = 16
) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
    """A thin SFace as OpenCV Zoo quantised it, in blocks along the last axis, whose last may be
    short; and what its parameters stand for, by `layer_part`."""
    draw = np.random.default_rng(0)
    meant: dict[str, NDArray[np.float32]] = {}
    constants: dict[str, NDArray[np.generic]] = {}
    nodes = []

    def quantise(name: str, *shape: int) -> None:
        rows = (shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else shape
        size = min(block, rows[-1])
        blocks = (*rows[:-1], -(-rows[-1] // size))
        levels = draw.integers(-128, 128, rows, dtype=np.int8)
        scales = draw.uniform(0.01, 0.02, blocks).astype(np.float32)
        zeros = draw.integers(-9, 9, blocks, dtype=np.int8)
        value = np.empty(rows, np.float32)
        for place in np.ndindex(*rows):
            at = (*place[:-1], place[-1] // size)
            value[place] = (np.float32(levels[place]) - np.float32(zeros[at])) * scales[at]
        meant[name] = value.reshape(shape)
        constants[f"{name}_quantized"], constants[f"{name}_scales"] = levels, scales
        constants[f"{name}_zero_point"] = zeros
        inputs = [f"{name}_{part}" for part in ("quantized", "scales", "zero_point")]
        nodes.append(
            onnx.helper.make_node(
                "DequantizeLinear", inputs, [name], axis=len(rows) - 1, block_size=size
            )
        )
        if len(shape) == 4:
            constants[f"{name}_shape"] = np.array(shape, np.int64)

    def normalise(name: str, width: int, epsilon: float) -> None:
        parts = ("gamma", "beta", "moving_mean", "moving_var")
        for part in parts:
            meant[f"{name}_{part}"] = draw.uniform(0.5, 1.5, width).astype(np.float32)
            constants[f"{name}_{part}"] = meant[f"{name}_{part}"]
        inputs = ["x", *(f"{name}_{part}" for part in parts)]
        nodes.append(onnx.helper.make_node("BatchNormalization", inputs, [name], epsilon=epsilon))

    for name in convolutions:
        kernel = 3 if name == "conv_1" or name.endswith("_dw") else 1
        channels = 3 if name == "conv_1" else 1 if name.endswith("_dw") else WIDTH
        quantise(f"{name}_conv2d_weight", WIDTH, channels, kernel, kernel)
        normalise(f"{name}_batchnorm", WIDTH, 1e-3)
        constants[f"{name}_relu_gamma"] = draw.uniform(0, 1, (WIDTH, 1, 1)).astype(np.float32)
        meant[f"{name}_relu_gamma"] = constants[f"{name}_relu_gamma"]
    normalise("bn1", WIDTH, 2e-5)
    quantise("pre_fc1_weight", ANSWERS, WIDTH * 9)
    quantise("pre_fc1_bias", ANSWERS)
    normalise("fc1", ANSWERS, 2e-5)
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "thin", [], [], stored)
    return onnx.helper.make_model(graph).SerializeToString(), meant


def test_sface_is_dequantised_in_blocks_and_its_norms_folded() -> None:
    content, meant = onnx_file()
    converted = convert_sface({"x.onnx": content})
    assert len(converted) == 3 * len(SFACE_CONVOLUTIONS) + 4
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}

    def norm(x: Tensor, name: str, epsilon: float) -> Tensor:
        mean, variance, gamma, beta = (
            torch.from_numpy(meant[f"{name}_{part}"])
            for part in ("moving_mean", "moving_var", "gamma", "beta")
        )
        return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)

    draw = torch.Generator().manual_seed(0)
    for name in SFACE_CONVOLUTIONS:
        weight = torch.from_numpy(meant[f"{name}_conv2d_weight"])
        groups = WIDTH if name.endswith("_dw") else 1
        x = torch.randn(2, weight.shape[1] * groups, 5, 5, generator=draw)
        wanted = norm(F.conv2d(x, weight, groups=groups), f"{name}_batchnorm", 1e-3)
        bias = converted[f"{name}.bias"]
        found = F.conv2d(x, converted[f"{name}.weight"], bias, groups=groups)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        slopes = torch.from_numpy(meant[f"{name}_relu_gamma"]).flatten()
        assert torch.equal(converted[f"{name}.slope"], slopes)
    x = torch.randn(2, WIDTH, 3, 3, generator=draw)
    head = x * converted["head.scale"][:, None, None] + converted["head.shift"][:, None, None]
    torch.testing.assert_close(head, norm(x, "bn1", 2e-5))
    weight, bias = (torch.from_numpy(meant[f"pre_fc1_{part}"]) for part in ("weight", "bias"))
    flat = x.flatten(1)
    torch.testing.assert_close(
        F.linear(flat, converted["linear.weight"], converted["linear.bias"]),
        norm(F.linear(flat, weight, bias), "fc1", 2e-5),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "content", [b"", b"not a model", onnx_file(SFACE_CONVOLUTIONS[:-1])[0], onnx_file()[0][:-900]]
)
def test_sface_refuses_other_files(content: bytes) -> None:
    with pytest.raises(LmexpError, match="not the expected ONNX file") as caught:
        convert_sface({"x.onnx": content})
    assert "\n" not in str(caught.value)


def test_sface_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(LmexpError, match="pip install onnx"):
        convert_sface({"x.onnx": b""})


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
