"""The tiny random generator behaves as a large one."""

from __future__ import annotations

import pytest
import torch

from lmexp.errors import LmexpError
from lmexp.generators.protocol import Generator
from lmexp.generators.tiny_random import TinyRandom


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_every_style_and_noise_map_moves_the_image(resolution: int) -> None:
    generator = TinyRandom(resolution=resolution)  # type: ignore[arg-type]
    assert isinstance(generator, Generator)
    torch.manual_seed(0)
    w = generator.mapping(torch.randn(2, generator.z_dim))
    ws = w[:, None].repeat(1, generator.num_ws, 1).requires_grad_()
    noise = [torch.randn(2, 1, *shape, requires_grad=True) for shape in generator.noise_shapes]
    images = generator.synthesis(ws, noise)
    assert images.shape == (2, 3, resolution, resolution)
    assert images.abs().max() <= 1 and images.std() > 0.05
    (images * torch.randn_like(images)).sum().backward()
    assert ws.grad is not None and ws.grad.isfinite().all() and (ws.grad != 0).any(dim=2).all()
    for buffer in noise:
        assert buffer.grad is not None and buffer.grad.isfinite().all()
        assert (buffer.grad != 0).flatten(1).any(dim=1).all()


def test_own_noise_is_constant_and_can_be_replaced() -> None:
    generator = TinyRandom()
    ws = torch.zeros(1, generator.num_ws, generator.w_dim)
    own = [generator.get_buffer(f"noise_{index}") for index in range(len(generator.noise_shapes))]
    assert torch.equal(generator.synthesis(ws), generator.synthesis(ws, own))
    other = [torch.zeros_like(noise) for noise in own]
    assert not torch.equal(generator.synthesis(ws), generator.synthesis(ws, other))


def test_gradcheck() -> None:
    generator = TinyRandom(resolution=16, dim=3, channels=4).double()
    ws = torch.randn(2, generator.num_ws, 3, dtype=torch.double, requires_grad=True)
    noise = [
        torch.randn(2, 1, *shape, dtype=torch.double, requires_grad=True)
        for shape in generator.noise_shapes
    ]
    assert torch.autograd.gradcheck(
        lambda ws, *noise: generator.synthesis(ws, noise), (ws, *noise), fast_mode=True
    )


def test_seed_decides_weights_and_digest() -> None:
    first, again, other = TinyRandom(seed=1), TinyRandom(seed=1), TinyRandom(seed=2)
    z = torch.randn(1, 16)
    assert torch.equal(first.mapping(z), again.mapping(z))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256


def test_images_of_a_batch_are_strangers() -> None:
    generator = TinyRandom()
    ws = torch.randn(3, generator.num_ws, generator.w_dim)
    batch = generator.synthesis(ws)
    for index in range(3):
        alone = generator.synthesis(ws[index : index + 1])
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-5, rtol=1e-5)


def test_wrong_shapes_are_refused() -> None:
    generator = TinyRandom()
    with pytest.raises(LmexpError, match=r"reads \[N, 5, 16\]"):
        generator.synthesis(torch.zeros(1, 4, 16))
    with pytest.raises(LmexpError, match="this generator takes"):
        generator.synthesis(torch.zeros(1, 5, 16), [torch.zeros(1, 1, 4, 4)])
