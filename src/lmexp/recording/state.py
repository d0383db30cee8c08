"""A running job's state on disk: what a resumed run needs, or a refusal.

The file is safetensors (no code runs when it is read) with the plain numbers and a digest
over everything in its header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.recording.atomic_file import write_atomically

State = Mapping[str, Tensor | bool | int | float | str]
"""Tensors (latents, noise, moments, …) and plain values (step, …) by name."""


def save_state(path: Path, state: State) -> None:
    """Write `state`, bit for bit, in place of what `path` held.

    Args:
        path: the file.
        state: tensors of any shape, dtype and device, and plain values.

    Raises:
        DiskFullError, LmexpError: it cannot be written.
    """
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    scalars = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    text = json.dumps(scalars, sort_keys=True)
    # Names may share storage (w expanded to ws); safetensors wants each to own its bytes.
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    header = {"scalars": text, "sha256": _digest(owned, text)}
    write_atomically(path, save(owned, metadata=header))


def load_state(
    path: Path, device: str | torch.device = "cpu"
) -> dict[str, Tensor | bool | int | float | str]:
    """Read what `save_state` wrote.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        LmexpError: the file is missing, cut short or changed; nothing of it is used.
    """
    advice = "remove it, and the run starts at its first step"
    if not path.is_file():
        raise LmexpError(f"{path}: no saved state here; run the job without it")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise LmexpError(f"{path}: the saved state is damaged ({said}); {advice}") from error
    text = header.get("scalars", "")
    if header.get("sha256") != _digest(tensors, text):
        raise LmexpError(f"{path}: the saved state fails its digest; {advice}")
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {**moved, **json.loads(text)}


def _digest(tensors: Mapping[str, Tensor], scalars: str) -> str:
    digest = hashlib.sha256(scalars.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
