"""Aligned faces on disk: a photo is searched for its face once, however many runs show it."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import zipfile
from pathlib import Path

import numpy as np

from lmexp.errors import LmexpError
from lmexp.faces.protocol import FaceBox
from lmexp.faces.targets import AlignedFace
from lmexp.recording.atomic_file import write_atomically

log = logging.getLogger("lmexp")

VERSION = 1
"""Of what alignment does; to be raised when the same photo would come out otherwise."""


class FaceStore:
    """`AlignedFace`s by key, a file each. What cannot be kept or read is aligned anew.

    Args:
        folder: where they are kept; made when something is to be kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> AlignedFace | None:
        """A face; None if it is not there, or damaged (a warning says so)."""
        path = self._path(key)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                return AlignedFace(
                    image=arrays["image"],
                    landmarks=arrays["landmarks"],
                    affine=arrays["affine"],
                    box=None if about["box"] is None else FaceBox(**about["box"]),
                    photo_size=None if about["photo_size"] is None else tuple(about["photo_size"]),
                    warnings=tuple(about["warnings"]),
                )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s: cannot be read (%s); its photo is aligned anew", path, error)
            return None

    def write(self, key: str, face: AlignedFace) -> None:
        """Keep a face; if that fails, a warning says so."""
        about = {
            "box": None if face.box is None else dataclasses.asdict(face.box),
            "photo_size": face.photo_size,
            "warnings": face.warnings,
        }
        data = io.BytesIO()
        np.savez_compressed(
            data,
            image=face.image,
            landmarks=face.landmarks,
            affine=face.affine,
            about=np.array(json.dumps(about)),
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(key), data.getvalue(), durable=False)
        except (OSError, LmexpError) as error:
            log.warning("%s: an aligned face cannot be kept (%s)", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"
