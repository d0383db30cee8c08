"""What a file is, apart from what it is called and where it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any


def digest_file(path: Path) -> str:
    """SHA-256 of a file; read again only if its size or time has changed.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    return _digest(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_files(node: Any) -> Any:
    """A component's keywords, every name of a file that exists replaced by the file's digest.

    Args:
        node: plain data; mappings and lists are walked, `_target_` is left alone.
    """
    if isinstance(node, Mapping):
        return {
            key: value if key == "_target_" else replace_files(value) for key, value in node.items()
        }
    if isinstance(node, list):
        return [replace_files(value) for value in node]
    if isinstance(node, str) and len(node) < 4096 and "\0" not in node:
        path = Path(node).expanduser()
        try:
            if path.is_file():
                return f"sha256:{digest_file(path)}"
        except OSError:
            return node
    return node
