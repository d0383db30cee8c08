"""The smoothness term against a case by hand, the files it reads, and those it refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.generators.tiny_random import TinyRandom
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets
from lmexp.losses.smoothness import LatentSmoothness
from lmexp.recording.run_folder import RunFolder

UNUSED = cast(Any, None)
GENERATOR = TinyRandom(resolution=16, dim=4, channels=4)
LAYERS = GENERATOR.num_ws
CONTEXT = Context(GENERATOR, UNUSED, UNUSED)
TARGETS = Targets(torch.zeros(1, 3, 16, 16), torch.zeros(1, 68, 2), torch.zeros(1, 3, 16, 16))
PREVIOUS = np.random.default_rng(0).standard_normal((1, LAYERS, 4)).astype(np.float32)


def bind(previous: Path | None) -> BoundTerm:
    name = None if previous is None else str(previous)
    return LatentSmoothness(previous=name).bind(CONTEXT, TARGETS)


def candidate(ws: Tensor) -> Candidate:
    return Candidate(ws.new_zeros(len(ws), 3, 16, 16), ws, (), 0, UNUSED)


def store(path: Path, **arrays: np.ndarray) -> Path:
    with path.open("wb") as file:
        np.savez(file, **cast(Any, arrays))
    return path


def test_by_hand(tmp_path: Path) -> None:
    path = store(tmp_path / "w.npz", w=np.zeros((1, LAYERS, 4)))
    ws = torch.zeros(2, LAYERS, 4)
    ws[1, 0, 2] = -3.0
    floor = 1e-3 * LAYERS * 4
    values = bind(path)(candidate(ws))
    assert values.tolist() == pytest.approx([floor, floor + 3 - 1e-3], rel=1e-5)


def test_by_numpy_job_by_job_with_a_gradient(tmp_path: Path) -> None:
    term = bind(store(tmp_path / "w.npz", w=PREVIOUS))
    ws = np.random.default_rng(1).standard_normal((3, LAYERS, 4))
    expected = np.sqrt((ws - PREVIOUS) ** 2 + 1e-6).sum((1, 2))
    at = torch.from_numpy(ws).requires_grad_()
    np.testing.assert_allclose(term(candidate(at)).detach(), expected, rtol=1e-12)
    alone = [term(candidate(at[k : k + 1])) for k in range(3)]
    torch.testing.assert_close(torch.cat(alone), term(candidate(at)))
    assert torch.autograd.gradcheck(lambda w: term(candidate(w)), (at,))


def test_reads_what_a_run_has_written(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_projection(PREVIOUS)
    ws = torch.from_numpy(PREVIOUS)
    floor = pytest.approx([1e-3 * LAYERS * 4], rel=1e-4)
    assert bind(tmp_path)(candidate(ws)).tolist() == floor
    assert bind(tmp_path / "projected_w.npz")(candidate(ws)).tolist() == floor
    digest = hashlib.sha256((tmp_path / "projected_w.npz").read_bytes()).hexdigest()
    assert LatentSmoothness(previous=str(tmp_path)).weights_sha256 == digest


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4)])
def test_one_style_stands_for_all_layers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    style = np.arange(4.0)
    path = store(tmp_path / "w.npz", w=style.reshape(shape))
    ws = torch.from_numpy(style).expand(1, LAYERS, 4)
    assert bind(path)(candidate(ws)).tolist() == pytest.approx([1e-3 * LAYERS * 4])


@pytest.mark.parametrize("shape", [(1, LAYERS + 1, 4), (1, LAYERS, 5), (2, LAYERS, 4), ()])
def test_latents_of_another_generator_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = store(tmp_path / "w.npz", w=np.ones(shape))
    with pytest.raises(LmexpError, match="give a run of the same generator") as caught:
        bind(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(LmexpError, match="give a run of the same generator"):
        LatentSmoothness(previous=str(path)).check(GENERATOR)


def write_faulty(folder: Path, kind: str) -> Path:
    path = folder / "w.npz"
    if kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, PREVIOUS)
    elif kind == "pickle":
        with path.open("wb") as file:
            np.savez(file, w=np.array([{"a": 1}], dtype=object))
    elif kind == "other name":
        store(path, latents=PREVIOUS)
    elif kind == "nan":
        store(path, w=np.full((1, LAYERS, 4), np.nan))
    elif kind == "whole numbers":
        store(path, w=np.ones((1, LAYERS, 4), dtype=np.int64))
    elif kind == "cut":
        whole = store(path, w=PREVIOUS).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "changed":
        whole = bytearray(store(path, w=PREVIOUS).read_bytes())
        whole[len(whole) // 3] ^= 0xFF
        path.write_bytes(whole)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("missing", "text", "empty", "array", "pickle"),
        *("cut", "changed", "nan", "other name", "whole numbers"),
    ],
)
def test_faulty_files_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = write_faulty(tmp_path, kind)
    with pytest.raises(
        LmexpError, match=r"^loss\.smoothness\.previous: .*; give a finished"
    ) as error:
        bind(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_run_without_latents_yet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LmexpError, match=r"projected_w\.npz can't be read \(No such file"):
        bind(tmp_path)


def test_first_frame_without_previous_latents_is_told_what_to_do() -> None:
    with pytest.raises(LmexpError, match=r"previous: missing.*first frame leave the term out"):
        bind(None)


def test_off_at_weight_zero_and_while_the_look_is_inverted() -> None:
    terms = {"smoothness": LatentSmoothness()}
    look = Targets(TARGETS.look, TARGETS.look_landmarks)
    # Nothing is read, or the missing file would be found.
    assert Objective.bind(terms, [{"smoothness": 0.0}], CONTEXT, TARGETS).names == ()
    assert Objective.bind(terms, [{"smoothness": 0.5}], CONTEXT, look).names == ()
