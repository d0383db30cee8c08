"""How the steps of a projection are computed faster, without changing what they compute.

Three independent means: frozen networks in half precision, compilation (torch.compile, whose
results are kept on disk), and one CUDA graph a step. Only the projection's loop uses them:
alignment, final pictures and scores come from the plain float32 networks.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lmexp.weights.store import cache_folder

log = logging.getLogger("lmexp")

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M")

_VARIANTS = 64
"""Compiled variants of one function: batch sizes, resolutions and settings that a sweep meets."""


@dataclass(frozen=True)
class Acceleration:
    """What is done to make steps faster; nothing by default.

    Attributes:
        half: arithmetic of frozen networks, `torch.bfloat16` or `torch.float16`; None: float32.
        compile: fuse networks and terms into few kernels, once per shape; costs a minute or two
            the first time, seconds from the cache.
        graphs: capture a step as one CUDA graph, so that launching it costs next to nothing.
    """

    half: torch.dtype | None = None
    compile: bool = False
    graphs: bool = False
    _networks: WeakKeyDictionary[nn.Module, nn.Module] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    @property
    def plain(self) -> bool:
        """Whether networks and functions stay as they are."""
        return self.half is None and not self.compile

    def fuse(self, function: Callable[P, R]) -> Callable[P, R]:
        """A pure function of tensors and constants -> the same in few kernels.

        Tensors that it closes over are read anew at every call.
        """
        return _compile(function) if self.compile else function

    def network(self, module: M) -> M:
        """A frozen network -> a copy of it for the steps; itself if there is nothing to gain.

        The copy's `synthesis`, if it has one, else its `forward` is compiled; a module with a
        method `compile_regions(fuse)` chooses itself, such as blocks of which it has many, each
        compiled once a shape. In half precision the module's own `lower_precision(dtype)` is
        called, if it has such a method, else that function runs under autocast; what it returns is
        float32 in any case.

        Args:
            module: a `torch.nn.Module` without gradients, on its device; others are returned as
                they are.
        """
        if self.plain or not isinstance(module, nn.Module):
            return module
        if module not in self._networks:
            self._networks[module] = self._accelerate(copy.deepcopy(module))
        return self._networks[module]  # type: ignore[return-value]

    def _accelerate(self, module: nn.Module) -> nn.Module:
        name = "synthesis" if hasattr(module, "synthesis") else "forward"
        if self.half is not None:
            lower = getattr(module, "lower_precision", None)
            if lower is not None:
                lower(self.half)
            else:
                setattr(module, name, _under_autocast(getattr(module, name), self.half))
        if self.compile:
            regions = getattr(module, "compile_regions", None)
            if regions is not None:
                regions(self.fuse)
            else:
                setattr(module, name, _compile(getattr(module, name)))
        return module


PLAIN = Acceleration()


_ERRORS = 0.05, 0.6
"""Kinks of an activation turn on rounding, and SFace's gradients in bfloat16 differ by a third from
those in float32. Wrong is about 1."""


class Checked:
    """A function of batches whose kernels are held against plain operations before their first use.

    Kernels are compiled for a card, by a compiler, that nobody may have tried them with. One row of
    the first call shows whether values and gradients are what they should be; if not, one line says
    so and the plain form serves from then on.

    Args:
        name: what has the kernels, for that line.
        fast: the kernels.
        plain: the same in plain operations.
        fallback: what is called instead of the kernels: the plain form, perhaps compiled.
        slopes: how many of the inputs, from the first on, the kernels have gradients for; None:
            all.
        errors: relative, of values and of gradients, that are half precision's own.
    """

    def __init__(
        self,
        name: str,
        fast: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        fallback: Callable[..., Tensor],
        slopes: int | None = None,
        errors: tuple[float, float] = _ERRORS,
    ) -> None:
        self._name = name
        self._slopes = slopes
        self._errors = errors
        self._fast, self._plain, self._fallback = fast, plain, fallback
        self._chosen: Callable[..., Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Each input is [N, …], and so is the result."""
        if self._chosen is None:
            fault = self._find_fault(inputs)
            if fault:
                log.warning(
                    "hardware: the kernels of %s are not right on this GPU (%s); going on without "
                    "them, slower; please report it",
                    self._name,
                    fault,
                )
            self._chosen = self._fallback if fault else self._fast
        return self._chosen(*inputs)

    def _find_fault(self, inputs: Sequence[Tensor]) -> str:
        found = []
        for function in (self._plain, self._fast):
            try:
                found.append(_value_and_gradients(function, inputs, self._slopes))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if function is self._plain:
                    raise
                return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        (wanted, slopes), (got, gradients) = found
        if not _is_near(got, wanted, self._errors[0]):
            return "other values"
        for slope, gradient in zip(slopes, gradients, strict=True):
            if not _is_near(gradient, slope, self._errors[1]):
                return "other gradients"
        return ""


def _value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], slopes: int | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        rows = [value[:1].detach().clone() for value in inputs]
        leaves = [row.requires_grad_() for row in rows[:slopes]]
        value = function(*rows)
        # Fixed, of both signs, and in the range of half precision however many values there are.
        outer = torch.cos(torch.arange(value.numel(), device=value.device) * 1.7)
        outer = (outer / value.numel() ** 0.5).view(value.shape).to(value)
        gradients = torch.autograd.grad(value, leaves, outer)
    return value.detach(), gradients


def _is_near(got: Tensor, wanted: Tensor, bound: float) -> bool:
    size = wanted.double().norm()
    if not torch.isfinite(size):  # too large for half precision: nothing to hold it against
        return True
    return bool((got.double() - wanted.double()).norm() <= bound * size)


def _compile(function: Callable[P, R]) -> Callable[P, R]:
    # Where a second start finds what the first has compiled.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    # Imported where it is needed: it takes a second.
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    # Once a shape: a reduction of a size that is not known is not split among processors, and of a
    # noise map of 1024 px took a hundred times as long.
    return torch.compile(function, dynamic=False)


def _under_autocast(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def lowered(*tensors: Any) -> Any:
        device = next(t.device.type for t in tensors if isinstance(t, torch.Tensor))
        # A cache of casts would outlive the CUDA graph that made them.
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            return function(*tensors).float()

    return lowered
