"""How the steps of a projection are computed faster, without changing what they compute.

Three independent means: frozen networks in half precision, compilation (torch.compile, whose
results are kept on disk), and one CUDA graph a step. Only the projection's loop uses them:
alignment, final pictures and scores come from the plain float32 networks.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lmexp.weights.store import cache_folder

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
