"""Convert a StyleGAN2 checkpoint of another program to lmexp's safetensors, and say what it is.

    python scripts/convert_checkpoint.py ffhq.pkl ffhq.safetensors

FILE may be a StyleGAN2-ADA or StyleGAN2 pickle, a rosinality `.pt`, or a file of lmexp's own.
Nothing in it is run or imported. (lmexp converts what it is given by itself; this is for keeping
the result.)

Exit status: 0 if OUT was written, else 2, with one line on why not.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lmexp.checkpoints.checkpoint import Checkpoint, convert, write
from lmexp.errors import LmexpError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    chosen = parser.parse_args(arguments)
    try:
        require_free(chosen.file, chosen.out, chosen.force)
        checkpoint = convert(chosen.file, say)
        write(checkpoint, chosen.out)
    except LmexpError as fault:
        print(f"lmexp: {fault}", file=sys.stderr)
        return 2
    print("\n".join(describe(checkpoint)))
    print(f"written     {chosen.out}")
    return 0


def require_free(source: Path, out: Path, force: bool) -> None:
    """Refuse to write where something lies, or where a file of this name can't be found again.

    Raises:
        LmexpError: `out` can't be used.
    """
    if out.suffix != ".safetensors":
        raise LmexpError(f"{out}: it is safetensors that is written; end the name in .safetensors")
    if not out.parent.is_dir():
        raise LmexpError(f"{out.parent}: there is no such folder; make it first")
    # A link counts, even one that leads nowhere.
    if os.path.lexists(out):
        if out.is_dir():
            raise LmexpError(f"{out}: it is a folder; give another name")
        if source.exists() and out.exists() and source.samefile(out):
            raise LmexpError(f"{out}: it is the file to be converted; give another name")
        if not force:
            raise LmexpError(f"{out}: it exists; give another name, or --force to replace it")


def say(message: str) -> None:
    print(f"lmexp: {message}", file=sys.stderr)


def describe(checkpoint: Checkpoint) -> list[str]:
    """What was found, a line each."""
    config, other = checkpoint.generator, checkpoint.discriminator
    counted: dict[bool, int] = {False: 0, True: 0}
    for name, tensor in checkpoint.tensors.items():
        counted[name.startswith("discriminator.")] += tensor.numel()
    channels = ", ".join(f"{side}: {count}" for side, count in sorted(config.channels.items()))
    lines = [
        f"kind        {checkpoint.kind}",
        f"resolution  {config.resolution} px, architecture {config.architecture}",
        f"channels    {channels}",
        f"num_ws      {config.num_ws}",
        f"latents     z {config.z_dim}, w {config.w_dim}, {config.mapping_layers} mapping layers",
        f"classes     {config.c_dim or 'none'}",
        f"generator   {counted[False]:,} numbers",
    ]
    if other is None:
        lines.append("discriminator  none")
    else:
        lines.append(f"discriminator  {counted[True]:,} numbers, architecture {other.architecture}")
    return [*lines, f"sha256      {checkpoint.source_sha256}"]


if __name__ == "__main__":
    sys.exit(main())
