"""The smoothness term: latents must stay near those of the frame before."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.generators.protocol import Generator
from lmexp.losses.fidelity import latent_distance
from lmexp.losses.protocol import BoundTerm, Context, Targets

_KEY = "loss.smoothness.previous"
_FILE = "projected_w.npz"
_DAMAGED = (
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise on files of other kinds, cut short or changed."""


class LatentSmoothness:
    """`latent_distance` of the latents to those that an earlier run ended with.

    For the frames of a video: each frame names the run of the frame before. The first frame
    has none, so it leaves the term out. While the look alone is inverted the term is not
    used, so that all frames share one inversion.

    Args:
        weight: ≥ 0, λ of the term; the published command line's is 0.05.
        previous: run folder of the frame before, or a .npz file that holds its latents under
            `w`, [1, num_ws, w_dim] or less by leading axes, as this package and the tools of
            StyleGAN2 write it. One style for all layers, [1, w_dim], is repeated.

    Raises:
        LmexpError: when checked or bound, if `previous` is not given, cannot be read, or holds
            latents of another generator.
    """

    needs_expression: ClassVar[bool] = True

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 0.05,
        previous: str | None = None,
    ) -> None:
        self.weight = weight
        self.previous = previous
        self._read: tuple[Tensor, str] | None = None

    @property
    def weights_sha256(self) -> str:
        """Digest of the file of previous latents, for the run's summary."""
        return self._load()[1]

    def check(self, generator: Generator) -> None:
        """Refuse what `bind` would, before the look is inverted."""
        self._rows(generator)

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        previous = self._rows(context.generator).to(targets.look.device)

        fused = context.acceleration.fuse(latent_distance)
        return lambda candidate: fused(candidate.ws, previous)

    def _rows(self, generator: Generator) -> Tensor:
        """[num_ws, w_dim], or [1, w_dim] for all layers."""
        ws, _ = self._load()
        wanted = (generator.num_ws, generator.w_dim)
        # Leading axes of length 1 carry nothing; one row is the style of all layers.
        rows = ws.reshape(-1, ws.shape[-1]) if ws.ndim else ws.reshape(1, 1)
        if rows.shape[0] not in (1, wanted[0]) or rows.shape[1] != wanted[1]:
            raise LmexpError(
                f"{_KEY}: {self.previous} holds latents of shape {list(ws.shape)}, but this "
                f"generator reads [1, {wanted[0]}, {wanted[1]}]; give a run of the same generator"
            )
        return rows

    def _load(self) -> tuple[Tensor, str]:
        if self._read is None:
            self._read = _read_latents(self.previous)
        return self._read


def _read_latents(previous: str | None) -> tuple[Tensor, str]:
    """The array `w` of a run folder or .npz file as float32, and the file's SHA-256."""
    if previous is None:
        raise LmexpError(
            f"{_KEY}: missing; give the run folder of the frame before, or its {_FILE}; "
            "for a first frame leave the term out, or set loss.smoothness.weight=0"
        )
    path = Path(previous).expanduser()
    path = path / _FILE if path.is_dir() else path
    advice = f"give a finished run's folder, or its {_FILE}"
    try:
        raw = path.read_bytes()
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            w = arrays["w"]
    except OSError as error:
        # A file that is no archive is an OSError without a system's reason.
        reason = error.strerror or "it is no .npz file"
        raise LmexpError(f"{_KEY}: {path} can't be read ({reason}); {advice}") from error
    except KeyError as error:
        raise LmexpError(f"{_KEY}: {path} holds no array 'w'; {advice}") from error
    except _DAMAGED as error:
        raise LmexpError(f"{_KEY}: {path} can't be read (it is no .npz file); {advice}") from error
    if not np.issubdtype(w.dtype, np.floating) or not np.isfinite(w).all():
        raise LmexpError(f"{_KEY}: {path} holds values that are no finite numbers; {advice}")
    return torch.from_numpy(w.astype(np.float32)), hashlib.sha256(raw).hexdigest()
