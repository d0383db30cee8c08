"""Launching Triton kernels so that one is ready when the one before it ends.

A step is hundreds of kernels of some µs, each reading what the one before it wrote. On a GPU from
Hopper on, the next one's programs can take their places while the last ones of the one before are
still at work, and wait there for its results (programmatic dependent launch). A kernel that is
launched so must begin with `await_turn`: before that it may neither read nor write.
"""

# "no cover": it runs on GPUs and, when tested, in a process of its own.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def _is_programmatic() -> bool:
    """Whether all GPUs here can, and kernels are compiled for them, not interpreted."""
    if triton.knobs.runtime.interpret or torch.version.cuda is None:
        return False
    count = torch.cuda.device_count()
    return count > 0 and all(torch.cuda.get_device_capability(k) >= (9, 0) for k in range(count))


PROGRAMMATIC = tl.constexpr(_is_programmatic())
"""Whether kernels are launched this way; compiled into them."""


@triton.jit
def await_turn():  # type: ignore[no-untyped-def] # pragma: no cover
    """The first thing a kernel does: wait until all results of the one before it are there."""
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any
) -> None:  # pragma: no cover
    """Run a kernel whose first line is `await_turn()`."""
    if PROGRAMMATIC.value:
        options["launch_pdl"] = True
    kernel[grid](*args, **options)
