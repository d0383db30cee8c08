"""Kernels that are launched before the one in front of them has ended."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lmexp

PACKAGE = Path(lmexp.__file__).parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function that Triton compiles, with its file's name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "triton.jit" in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and any(
                    "triton.jit" in ast.unparse(one) for one in node.decorator_list
                ):
                    yield path.name, node


def test_every_kernel_waits_before_it_does_anything() -> None:
    kernels = [(name, node) for name, node in functions() if node.name.endswith("kernel")]
    assert len(kernels) > 20
    for name, node in kernels:
        assert ast.unparse(node.body[0]) == "await_turn()", f"{name}: {node.name}"


def test_every_kernel_is_launched_by_what_knows_of_it() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "kernel_launch.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                called = ast.unparse(node.func.value)
                assert not called.endswith("kernel"), f"{path.name}: {called}[…](…)"


@pytest.mark.parametrize("programmatic", [True, False])
def test_waiting_is_compiled_where_it_can_be(
    programmatic: bool, monkeypatch: pytest.MonkeyPatch, compile_kernel: Callable[..., Any]
) -> None:
    import triton.language as tl

    from lmexp import adam_triton, kernel_launch

    monkeypatch.setattr(kernel_launch, "PROGRAMMATIC", tl.constexpr(programmatic))
    # Whoever compiled them before has noted the other value.
    for function in (kernel_launch.await_turn, adam_triton._normalise_kernel):
        monkeypatch.setattr(function, "hash", None)
        monkeypatch.setattr(function, "used_global_vals", {})
    kernel = adam_triton._normalise_kernel
    types = {"programs": "i32", "count": "i32", "broken": "*i1"}
    made = compile_kernel(kernel, types, {"BLOCK": 128, "MOST": 16})
    assert ("griddepcontrol.wait" in made.asm["ptx"]) == programmatic


def test_kernels_are_launched_early_where_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    from lmexp import kernel_launch

    told: list[tuple[object, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: told.append((grid, args, options))

    for programmatic in (False, True):
        monkeypatch.setattr(kernel_launch, "PROGRAMMATIC", tl.constexpr(programmatic))
        kernel_launch.launch(Kernel(), (3, 2), 7, num_warps=4)
    assert told == [
        ((3, 2), (7,), {"num_warps": 4}),
        ((3, 2), (7,), {"num_warps": 4, "launch_pdl": True}),
    ]
