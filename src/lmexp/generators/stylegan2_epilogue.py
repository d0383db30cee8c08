"""What follows a convolution of StyleGAN2's generator, and how its upsampling is split from it.

In half precision on a GPU the feature maps' way through memory costs more than their arithmetic.
So all that lies between two convolutions is one pass, the epilogue: low-pass filter,
demodulation, noise, bias, LeakyReLU, clamp, the product with the image layer's weights, and the
next convolution's modulation. On CUDA it is a Triton kernel with a backward pass of its own
(`stylegan2_triton`), elsewhere the formula in plain tensor operations (`compute`).

A convolution that doubles the side, a transposed 3x3 one of stride 2 followed by the 4x4 low-pass
filter, comes in three splits, which all compute the same (`Upsampling`):

- "transposed": as written; the epilogue filters with 4x4 taps;
- "quads": the filter (1, 3, 3, 1) is (1, 1) * (1, 2, 1). The kernel takes the first factor and
  becomes 4x4, which is a 2x2 convolution at the lower resolution that makes the four pixels of each
  cell as 4 C channels; the epilogue filters with 3x3 taps. 16/9 of the multiplications;
- "phases": the kernel takes the whole filter and becomes 6x6, a 3x3 convolution at the lower
  resolution to 4 C channels; nothing is left to filter. Four times the multiplications, and no
  further pass in the backward direction.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lmexp.generators.stylegan2_layers import LEAK

Split = Literal["same", "transposed", "quads", "phases"]
"""How a convolution made what the epilogue reads; "same": it keeps the side."""

_TAPS: dict[Split, tuple[float, ...]] = {
    "same": (1.0,),
    "transposed": (0.25, 0.75, 0.75, 0.25),
    "quads": (0.25, 0.5, 0.25),
    "phases": (1.0,),
}


def compose(weight: Tensor, split: Split) -> Tensor:
    """The kernel of one split.

    Args:
        weight: [C_out, C_in, 3, 3], canonical: of the transposed convolution; or, with "same", of
            an ordinary one.
        split: which.

    Returns:
        "same": as it is; "transposed": [C_in, C_out, 3, 3]; "quads": [4 C_out, C_in, 2, 2];
        "phases": [4 C_out, C_in, 3, 3]. Rows of the last two are ordered by (row and column of
        the pixel in its cell, channel).
    """
    if split == "same":
        return weight
    if split == "transposed":
        return weight.transpose(0, 1)
    line = (1.0, 1.0) if split == "quads" else (0.25, 0.75, 0.75, 0.25)
    taps, (C_out, C_in) = len(line), weight.shape[:2]
    # In float64: it happens once, and a GPU's float32 products may be of TF32's 10 bits.
    spread = torch.zeros(taps + 2, 3, dtype=torch.float64)
    for shift in range(3):
        spread[shift : shift + taps, shift] = torch.tensor(line, dtype=torch.float64)
    spread = spread.to(weight.device)
    full = (spread @ weight.double() @ spread.T).to(weight.dtype)
    # Tap m of the composed kernel takes input pixel i to output pixel 2i + m (less the border).
    # So pixel a of a cell reads taps a, a + 2, …, the later ones from earlier input pixels.
    phases = full.reshape(C_out, C_in, (2 + taps) // 2, 2, (2 + taps) // 2, 2)
    phases = phases.flip(2, 4).permute(3, 5, 0, 1, 2, 4)
    return phases.reshape(4 * C_out, C_in, (2 + taps) // 2, (2 + taps) // 2)


def convolve(x: Tensor, weight: Tensor, split: Split) -> Tensor:
    """What a split's convolution makes of x: [N, C_in, h, w], with its kernel.

    Returns:
        "same": [N, C_out, h, w]; "transposed": [N, C_out, 2h + 1, 2w + 1]; "quads":
        [N, 4 C_out, h + 1, w + 1]; "phases": [N, 4 C_out, h, w].
    """
    if split == "transposed":
        return F.conv_transpose2d(x, weight, stride=2)
    return F.conv2d(x, weight, padding=1)


def resample(source: Tensor, split: Split) -> Tensor:
    """What the low-pass filter leaves of what `convolve` made: [N, C, H, W].

    Sums of shifted slices, which torch.compile fuses with what follows.
    """
    if split in ("phases", "quads"):
        N, C, height, width = source.shape
        source = source.reshape(N, 2, 2, C // 4, height, width).permute(0, 3, 4, 1, 5, 2)
        source = source.reshape(N, C // 4, 2 * height, 2 * width)
    taps = _TAPS[split]
    if len(taps) == 1:
        return source
    if split == "transposed":
        source = F.pad(source, [1, 1, 1, 1])
    height, width = source.shape[2] - len(taps) + 1, source.shape[3] - len(taps) + 1
    total: Tensor | None = None
    for down, above in enumerate(taps):
        for right, beside in enumerate(taps):
            part = source[..., down : down + height, right : right + width] * (above * beside)
            total = part if total is None else total + part
    assert total is not None
    return total


def double_side(image: Tensor) -> Tensor:
    """Insert zeros and filter with (1, 3, 3, 1): [N, C, h, w] -> [N, C, 2h, 2w].

    Written as shifts, which torch.compile fuses with what is added.
    """
    N, C, height, width = image.shape
    padded = F.pad(image, [1, 1, 1, 1])
    middle = padded[:, :, 1:-1]
    rows = torch.stack(
        [middle * 0.75 + padded[:, :, :-2] * 0.25, middle * 0.75 + padded[:, :, 2:] * 0.25], 3
    ).reshape(N, C, 2 * height, width + 2)
    middle = rows[..., 1:-1]
    return torch.stack(
        [middle * 0.75 + rows[..., :-2] * 0.25, middle * 0.75 + rows[..., 2:] * 0.25], 4
    ).reshape(N, C, 2 * height, 2 * width)


def grow(image: Tensor, layer: Tensor | None) -> Tensor:
    """The image at twice the side, plus what this resolution's layer adds.

    Args:
        image: [N, 3, h, w], float32.
        layer: [N, 3, 2h, 2w], float32; None: nothing.

    Returns:
        [N, 3, 2h, 2w].
    """
    if image.is_cuda:
        # Triton comes with PyTorch's CUDA builds alone.
        from lmexp.generators.stylegan2_triton import Grown

        grown: Tensor = Grown.apply(image, layer)
        return grown
    image = double_side(image)
    return image if layer is None else image + layer


def compute(
    source: Tensor,
    demodulation: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    styles: Tensor | None,
    rgb: Tensor | None,
    features: bool,
    split: Split,
    clamp: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The epilogue as plain tensor operations, in the type of `demodulation`.

    See `epilogue`.
    """
    x = resample(source.to(demodulation.dtype), split) * demodulation[:, :, None, None]
    if noise is not None:
        x = x + (noise if strength is None else noise * strength)
    x = F.leaky_relu(x + bias[:, None, None], LEAK)
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    image = None
    if rgb is not None:
        rows = x.permute(0, 2, 3, 1).flatten(1, 2) @ rgb.transpose(1, 2)
        image = rows.transpose(1, 2).reshape(len(x), rgb.shape[1], *x.shape[2:])
    if not features:
        return None, image
    if styles is not None:
        x = x * styles[:, :, None, None]
    return x.to(source.dtype), image


def epilogue(
    source: Tensor,
    demodulation: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    styles: Tensor | None,
    rgb: Tensor | None,
    features: bool,
    split: Split,
    clamp: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """All that lies between one convolution and the next.

    Args:
        source: what `convolve` made, in any type, best channels-last.
        demodulation: [N, C], factors of the rows, float32.
        bias: [C], float32.
        noise: [N, 1, H, W] or [1, 1, H, W], float32; None for none.
        strength: of the noise, a number, float32; None: the noise as it is.
        styles: [N, C], the next convolution's modulation, float32; None leaves features as they
            are.
        rgb: [N, 3, C], modulated weights of the image layer, float32; None: there is none.
        features: whether features are wanted.
        split: how `convolve` made the source.
        clamp: bound on the activations; None for none.

    Returns:
        (features [N, C, H, W] in the source's type, what the weights `rgb` make of the activations
        before the modulation [N, 3, H, W], float32); None for what is not asked for.
    """
    if source.is_cuda:
        return fuse(
            source, demodulation, bias, noise, strength, styles, rgb, features, split, clamp
        )
    return compute(source, demodulation, bias, noise, strength, styles, rgb, features, split, clamp)


def fuse(
    source: Tensor,
    demodulation: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    styles: Tensor | None,
    rgb: Tensor | None,
    features: bool,
    split: Split,
    clamp: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The epilogue by Triton kernels; see `epilogue`."""
    if noise is not None and noise.requires_grad:
        noise = noise.expand(len(source), -1, -1, -1)
    phases, taps = split in ("phases", "quads"), len(_TAPS[split])
    made, image = _epilogue_op(
        source,
        demodulation,
        bias,
        noise,
        strength,
        styles,
        rgb,
        features,
        phases,
        taps,
        clamp or 0.0,
    )
    return made if features else None, None if rgb is None else image


_ARGUMENTS = (
    "Tensor source, Tensor demodulation, Tensor bias, Tensor? noise, Tensor? strength, "
    "Tensor? styles, Tensor? rgb, bool features, bool phases, int taps, float clamp"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:  # pragma: no cover
    # Triton comes with PyTorch's CUDA builds alone.
    from lmexp.generators import stylegan2_triton

    return stylegan2_triton.forward(*arguments, leak=LEAK)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:  # pragma: no cover
    from lmexp.generators import stylegan2_triton

    return stylegan2_triton.backward(*arguments, leak=LEAK)


def _sides(source: Tensor, phases: bool, taps: int) -> tuple[int, int, int, int]:
    N, C, height, width = source.shape
    if phases:
        C, height, width = C // 4, 2 * height, 2 * width
    border = {1: 0, 3: 2, 4: 1}[taps]
    return N, C, height - border, width - border


def _forward_shapes(
    source: Tensor,
    demodulation: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    styles: Tensor | None,
    rgb: Tensor | None,
    features: bool,
    phases: bool,
    taps: int,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    N, C, height, width = _sides(source, phases, taps)
    made = source.new_empty(0)
    if features:
        made = torch.empty(
            (N, C, height, width),
            dtype=source.dtype,
            device=source.device,
            memory_format=torch.channels_last,
        )
    shape = (0,) if rgb is None else (N, 3, height, width)
    return made, torch.empty(shape, dtype=torch.float32, device=source.device)


def _backward_shapes(
    grad_features: Tensor,
    grad_image: Tensor,
    source: Tensor,
    demodulation: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    styles: Tensor | None,
    rgb: Tensor | None,
    features: bool,
    phases: bool,
    taps: int,
    clamp: float,
    noise_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N, C, height, width = _sides(source, phases, taps)
    rows = 1 + (styles is not None) + 3 * (rgb is not None)
    shape = (N, 1, height, width) if noise_gradient else (0,)
    return (
        torch.empty_like(source, memory_format=torch.channels_last),
        torch.empty(shape, dtype=torch.float32, device=source.device),
        torch.empty((N, rows, C), dtype=torch.float32, device=source.device),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.choices = inputs[7:]


def _differentiate(ctx: Any, grad_features: Tensor, grad_image: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    styles, rgb = tensors[5], tensors[6]
    wants_noise = bool(ctx.needs_input_grad[3])
    source, noise, rows = _backward_op(
        grad_features, grad_image, *tensors, *ctx.choices, wants_noise
    )
    return (
        source,
        rows[:, 0],
        None,
        noise if wants_noise else None,
        None,
        None if styles is None else rows[:, 1],
        None if rgb is None else rows[:, -3:],
        None,
        None,
        None,
        None,
    )


_epilogue_op = torch.library.custom_op(
    "lmexp::stylegan2_epilogue",
    _forward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "lmexp::stylegan2_epilogue_backward",
    _backward,
    mutates_args=(),
    schema=(
        f"(Tensor grad_features, Tensor grad_image, {_ARGUMENTS}, bool noise_gradient) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
_epilogue_op.register_fake(_forward_shapes)
_backward_op.register_fake(_backward_shapes)
_epilogue_op.register_autograd(_differentiate, setup_context=_keep)
