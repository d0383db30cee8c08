"""Record the digests of the weights that are part of this package."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from lmexp.errors import LmexpError
from lmexp.weights import registry, store


def seal() -> dict[str, str]:
    """Write the content digests of all packaged weights to `registry.DIGESTS`.

    To be run after a packaged file was trained anew; a test fails until it was.

    Returns:
        Digests by name.

    Raises:
        LmexpError: there is a file that the registry does not know.
    """
    files = sorted(registry.DATA.glob("*.safetensors"))
    unknown = [path.name for path in files if path.stem not in registry.ENTRIES]
    if unknown:
        raise LmexpError(
            f"{', '.join(unknown)}: not in the registry; add an Entry to lmexp/weights/registry.py"
        )
    digests = {path.stem: store.digest(load_file(path)) for path in files}
    scratch = registry.DIGESTS.with_suffix(".part")
    scratch.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    scratch.replace(registry.DIGESTS)
    registry.packaged_digests.cache_clear()
    return digests
