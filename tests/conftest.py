from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

# Processes that share the cores make any example slow now and then; that is no fault.
settings.register_profile("shared_cores", deadline=None)
settings.load_profile("shared_cores")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes half a minute comes first: at the end one core would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test draws the same numbers, whichever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def recorded_files() -> frozenset[str]:
    """What the recorder of a finished job leaves in its folder."""
    return frozenset(
        {
            "config.yaml",
            "landmarks.npz",
            "metrics.jsonl",
            "proj.mp4",
            "proj.png",
            "proj_landmarks.png",
            "projected_noise.npz",
            "projected_w.npz",
            "status.json",
            "summary.json",
            "target_expression.png",
            "target_expression_landmarks.png",
            "target_look.png",
            "target_look_landmarks.png",
        }
    )


@pytest.fixture
def run_kernels() -> Callable[[str, str], tuple[int, float]]:
    """Runs a file of tests/numerics as a program: (its name, device) -> (figures, largest error).

    In a process of its own: Triton decides whether to interpret when it is first imported.
    """

    def run(name: str, device: str) -> tuple[int, float]:
        program = Path(__file__).parent / "numerics" / name
        interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
        done = subprocess.run(
            [sys.executable, program, device],
            env={**os.environ, **interpreted},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        count, worst = done.stdout.split()
        return int(count), float(worst)

    return run


@pytest.fixture
def compile_kernel() -> Callable[[Any, Mapping[str, str], Mapping[str, object]], Any]:
    """Compiles a Triton kernel for sm_90 without a GPU: (kernel, types, constants) -> the result.

    The interpreter takes what the compiler refuses, such as a variable of two types in a loop.
    Arguments that have neither a type nor a constant are pointers to float32.
    """

    def made(kernel: Any, types: Mapping[str, str], constants: Mapping[str, object]) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32")
            for name in kernel.arg_names
        }
        return triton.compile(
            ASTSource(kernel, signature=signature, constexprs=dict(constants)),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 4, "num_stages": 1},
        )

    return made
