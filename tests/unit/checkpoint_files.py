"""Write checkpoint files of every known kind, from the numbers in tests/data/checkpoints.npz.

The numbers are 16 px networks of random weights under their programs' own names, and what
NVIDIA's and rosinality's code computes with them (`z`, `ws`, `image`, `score`). The TensorFlow
ones went through `legacy.py` of stylegan2-ada-pytorch for that. Classes of those programs are
stood in for by empty ones of the same name while a file is written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

NUMBERS = Path(__file__).parents[1] / "data" / "checkpoints.npz"
KINDS = ("nvidia", "tensorflow", "rosinality")

SOURCE_TEXT = "raise SystemExit('the source text of a persistence record was run')\n"


def read_numbers(prefix: str) -> dict[str, np.ndarray]:
    """Arrays whose name begins so, by the rest of their name."""
    with np.load(NUMBERS) as file:
        return {
            name.removeprefix(f"{prefix}/"): file[name]
            for name in file.files
            if name.startswith(f"{prefix}/")
        }


@contextlib.contextmanager
def stand_ins(**contents: object) -> Iterator[None]:
    """Modules that exist for a moment; a name's double underscores are dots."""
    before = dict(sys.modules)
    try:
        for path, value in contents.items():
            module, _, name = path.replace("__", ".").rpartition(".")
            parts = module.split(".")
            for end in range(1, len(parts) + 1):
                parent = ".".join(parts[:end])
                sys.modules.setdefault(parent, types.ModuleType(parent))
            setattr(sys.modules[module], name, value)
            value.__module__, value.__qualname__, value.__name__ = module, name, name  # type: ignore[attr-defined]
        yield
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in {"torch_utils", "dnnlib"}:
                del sys.modules[name]


def _rebuild(meta: dict[str, Any]) -> object:
    raise AssertionError(f"a pickle of these tests was run: {sorted(meta)}")


class _EasyDict(dict[str, Any]):
    pass


class _Network:
    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def __getstate__(self) -> dict[str, Any]:
        return self.state


class Persistent:
    """An object that is pickled as NVIDIA's persistence does it."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str = SOURCE_TEXT) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.meta,)


def module_tree(
    tensors: dict[str, np.ndarray], attributes: dict[str, dict[str, Any]], name: str = ""
) -> Persistent:
    """Nested modules of dotted tensor names."""
    parameters: OrderedDict[str, Any] = OrderedDict()
    buffers: OrderedDict[str, Any] = OrderedDict()
    below: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        head, dot, rest = key.partition(".")
        if dot:
            below.setdefault(head, {})[rest] = value
        elif head in ("resample_filter", "noise_const", "w_avg"):
            buffers[head] = torch.from_numpy(value)
        else:
            parameters[head] = torch.nn.Parameter(torch.from_numpy(value))
    children = OrderedDict(
        (head, module_tree(part, attributes, f"{name}.{head}" if name else head))
        for head, part in below.items()
    )
    state = {
        "training": False,
        "_parameters": parameters,
        "_buffers": buffers,
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_modules": children,
        "weight_gain": np.float64(0.25),
        "_init_args": (),
        "_init_kwargs": {"z_dim": 16},
        **attributes.get(name, {}),
    }
    return Persistent("Generator", state)


def nvidia_objects(**attributes: dict[str, Any]) -> dict[str, Any]:
    """What StyleGAN2-ADA pickles, with attributes of modules (`__` in their names for dots)."""
    of_modules = {
        "mapping.fc0": {"bias_gain": 0.01, "activation": "lrelu"},
        "mapping.fc1": {"bias_gain": 0.01, "activation": "lrelu"},
        **{
            f"synthesis.b{side}.{layer}": {"conv_clamp": None, "activation": "lrelu"}
            for side in (4, 8, 16)
            for layer in ("conv0", "conv1")
        },
        "b4.mbstd": {"group_size": 4, "num_channels": 1},
        **{key.replace("__", "."): value for key, value in attributes.items()},
    }
    generator = module_tree(read_numbers("nvidia/G"), of_modules)
    discriminator = module_tree(read_numbers("nvidia/D"), of_modules)
    modules = discriminator.meta["state"]["_modules"]
    empty = {"_parameters": {}, "_buffers": {}, "_modules": {}, **of_modules["b4.mbstd"]}
    modules["b4"].meta["state"]["_modules"]["mbstd"] = Persistent("MinibatchStdLayer", empty)
    return {
        "G": generator,
        "D": discriminator,
        "G_ema": generator,
        "augment_pipe": None,
        "training_set_kwargs": _EasyDict(class_name="training.dataset.X", xflip=False),
    }


def pickle_nvidia(objects: object, protocol: int = 4) -> bytes:
    """The file's bytes."""
    with stand_ins(
        torch_utils__persistence___reconstruct_persistent_obj=_rebuild,
        dnnlib__util__EasyDict=_EasyDict,
    ):
        return pickle.dumps(objects, protocol=protocol)


def tensorflow_objects(**changes: Any) -> tuple[Any, Any, Any]:
    """(G, D, Gs) of StyleGAN2 in TensorFlow; `changes` go to the static keywords."""
    options = {
        "num_channels": 3,
        "resolution": 16,
        "label_size": 0,
        "fmap_base": 64,
        "mapping_lrmul": 0.01,
        "resample_kernel": [1, 3, 3, 1],
        "architecture": "skip",
        **changes,
    }
    variables = read_numbers("tensorflow/G")

    def make(prefix: str, func: str, **components: Any) -> _Network:
        own = [
            (name.removeprefix(prefix), value[()] if value.shape == () else value)
            for name, value in variables.items()
            if name.startswith(prefix) and ("/" in prefix or "/" not in name)
        ]
        return _Network(network_state(own, options, func, components))

    generator = make(
        "",
        "G_main",
        synthesis=make("synthesis/", "G_synthesis_stylegan2"),
        mapping=make("mapping/", "G_mapping"),
    )
    others = {key: value for key, value in options.items() if key != "architecture"}
    discriminator = _Network(
        network_state(list(read_numbers("tensorflow/D").items()), others, "D_stylegan2", {})
    )
    return generator, discriminator, generator


def network_state(
    variables: list[Any], options: dict[str, Any], func: str, components: dict[str, Any]
) -> dict[str, Any]:
    """What `dnnlib.tflib` keeps of a network."""
    return {
        "version": 4,
        "name": func,
        "static_kwargs": options,
        "components": components,
        "build_module_src": SOURCE_TEXT,
        "build_func_name": func,
        "variables": variables,
    }


def pickle_tensorflow(objects: object, protocol: int = 4) -> bytes:
    """The file's bytes."""
    with stand_ins(dnnlib__tflib__network__Network=_Network):
        return pickle.dumps(objects, protocol=protocol)


def rosinality_objects() -> dict[str, Any]:
    """What rosinality's training saves, with an optimizer's state and the command line."""
    ema = to_tensors(read_numbers("rosinality/g_ema"))
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    return {
        "g": {name: value.half() for name, value in ema.items()},
        "d": to_tensors(read_numbers("rosinality/d")),
        "g_ema": ema,
        "g_optim": optimizer.state_dict(),
        "latent_avg": torch.from_numpy(read_numbers("rosinality")["latent_avg"]),
        "args": argparse.Namespace(path=Path("data"), iter=800000, lr=0.002, augment=False),
        "ada_aug_p": 0.5,
    }


def to_tensors(arrays: dict[str, np.ndarray]) -> OrderedDict[str, torch.Tensor]:
    """A state dictionary."""
    return OrderedDict((name, torch.from_numpy(array)) for name, array in arrays.items())


def save_torch(objects: object, stream: bool = False) -> bytes:
    """The bytes that torch saves: its zip file, or the stream of before version 1.6."""
    file = io.BytesIO()
    torch.save(objects, file, _use_new_zipfile_serialization=not stream)
    return file.getvalue()


def all_files() -> dict[str, bytes]:
    """One valid file of every kind, by name."""
    return {
        "nvidia": pickle_nvidia(nvidia_objects()),
        "nvidia-protocol-2": pickle_nvidia(nvidia_objects(), protocol=2),
        "tensorflow": pickle_tensorflow(tensorflow_objects()),
        "tensorflow-protocol-2": pickle_tensorflow(tensorflow_objects(), protocol=2),
        "rosinality-zip": save_torch(rosinality_objects()),
        "rosinality-stream": save_torch(rosinality_objects(), stream=True),
    }
