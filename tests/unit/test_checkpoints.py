"""Checkpoints of every kind give the network they came from, and other files one clear line."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import checkpoint_files as files
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lmexp.checkpoints import checkpoint as checkpoints
from lmexp.checkpoints.checkpoint import Checkpoint, convert, load, validate, write
from lmexp.checkpoints.networks import average_w
from lmexp.checkpoints.refusal import RefusedError
from lmexp.errors import LmexpError
from lmexp.generators.stylegan2 import StyleGAN2
from lmexp.generators.stylegan2_config import tensor_shapes

SCRIPTS = Path(__file__).parents[2] / "scripts"
PREFIX = {"nvidia": "nvidia/G", "tensorflow": "tensorflow/G", "rosinality": "rosinality/g_ema"}


@pytest.fixture(scope="module")
def valid() -> dict[str, bytes]:
    return files.all_files()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMEXP_CACHE", str(tmp_path / "cache"))


def place(folder: Path, data: bytes, name: str = "file.bin") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def read(folder: Path, data: bytes) -> Checkpoint:
    return convert(place(folder, data), lambda _message: None)


def fault(folder: Path, data: bytes) -> str:
    with pytest.raises(LmexpError) as caught:
        read(folder, data)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(folder / "file.bin"))
    return message


@pytest.mark.parametrize("name", sorted(files.all_files()))
def test_each_file_computes_what_the_original_code_computes(
    tmp_path: Path, valid: dict[str, bytes], name: str
) -> None:
    path = place(tmp_path, valid[name])
    kind = name.split("-")[0]
    numbers = files.read_numbers(kind)
    generator = StyleGAN2(str(path), noise_mode="const")
    with torch.no_grad():
        ws = generator.mapping(torch.from_numpy(numbers["z"]))
        image = generator.synthesis(torch.from_numpy(numbers["ws"]))
        score = generator.discriminator()(torch.from_numpy(numbers["image"]), group_size=None)
    wanted = torch.from_numpy(numbers["ws"])
    torch.testing.assert_close(ws.reshape(2, -1, 16)[:, :1], wanted[:, :1], rtol=0, atol=1e-4)
    torch.testing.assert_close(image, torch.from_numpy(numbers["image"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        score.flatten(), torch.from_numpy(numbers["score"]).flatten(), rtol=0, atol=1e-4
    )


def test_raw_weights_keep_their_values_and_layout(tmp_path: Path, valid: dict[str, bytes]) -> None:
    found = read(tmp_path, valid["nvidia"]).tensors
    original = files.read_numbers("nvidia/G")
    np.testing.assert_array_equal(
        found["synthesis.8.conv0.weight"], original["synthesis.b8.conv0.weight"]
    )
    np.testing.assert_array_equal(found["mapping.layers.1.weight"], original["mapping.fc1.weight"])
    found = read(tmp_path, valid["tensorflow"]).tensors
    original = files.read_numbers("tensorflow/G")
    turned = original["synthesis/8x8/Conv0_up/weight"][::-1, ::-1].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(found["synthesis.8.conv0.weight"], turned)
    np.testing.assert_array_equal(
        found["synthesis.8.conv1.affine.bias"], original["synthesis/8x8/Conv1/mod_bias"] + 1
    )
    found = read(tmp_path, valid["rosinality-zip"]).tensors
    original = files.read_numbers("rosinality/g_ema")
    np.testing.assert_array_equal(
        found["synthesis.16.conv0.weight"], original["convs.2.conv.weight"][0]
    )
    np.testing.assert_array_equal(
        found["synthesis.16.conv1.noise"], original["noises.noise_4"][0, 0]
    )


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_pickle_protocols_make_no_difference(
    tmp_path: Path, valid: dict[str, bytes], protocol: int
) -> None:
    wanted = read(tmp_path, valid["nvidia"]).tensors
    again = read(tmp_path, files.pickle_nvidia(files.nvidia_objects(), protocol)).tensors
    for name, tensor in wanted.items():
        assert torch.equal(tensor, again[name]), name
    wanted = read(tmp_path, valid["tensorflow"]).tensors
    again = read(tmp_path, files.pickle_tensorflow(files.tensorflow_objects(), protocol)).tensors
    for name, tensor in wanted.items():
        assert torch.equal(tensor, again[name]), name


def test_generators_alone_are_read(tmp_path: Path) -> None:
    objects = files.nvidia_objects()
    alone = read(tmp_path, files.pickle_nvidia({"G_ema": objects["G_ema"]}))
    assert alone.discriminator is None
    assert set(alone.tensors) == set(tensor_shapes(alone.generator))
    bare = read(tmp_path, files.pickle_nvidia(objects["G_ema"]))
    assert torch.equal(bare.tensors["mapping.w_avg"], alone.tensors["mapping.w_avg"])
    only_g = read(tmp_path, files.pickle_nvidia({"G": objects["G"], "D": objects["D"]}))
    assert only_g.discriminator is not None
    assert "no G_ema" in only_g.notes[0]
    single = read(tmp_path, files.pickle_tensorflow(files.tensorflow_objects()[2]))
    assert (single.kind, single.discriminator) == ("stylegan2-tensorflow", None)
    state = files.rosinality_objects()["g_ema"]
    assert read(tmp_path, files.save_torch(state)).kind == "rosinality"
    half = read(tmp_path, files.save_torch({"g": files.rosinality_objects()["g"]}))
    assert "no g_ema" in half.notes[0]
    assert half.tensors["synthesis.const"].dtype == torch.float32


def test_attributes_of_modules_reach_the_config(tmp_path: Path) -> None:
    layers = {
        f"{prefix}{side}__{layer}": {"conv_clamp": 256.0}
        for prefix in ("synthesis__b", "b")
        for side in (4, 8, 16)
        for layer in ("conv0", "conv1", "torgb", "conv", "fromrgb")
    }
    found = read(
        tmp_path,
        files.pickle_nvidia(
            files.nvidia_objects(
                **layers,
                mapping__fc0={"bias_gain": np.float64(0.5)},
                mapping__fc1={"bias_gain": 0.5},
                b4__mbstd={"group_size": None},
            )
        ),
    )
    assert found.generator.conv_clamp == 256.0
    assert found.generator.mapping_lr_multiplier == 0.5
    assert found.discriminator is not None
    assert found.discriminator.mbstd_group_size is None
    assert found.discriminator.conv_clamp == 256.0


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"mapping__fc0": {"bias_gain": 0.5}}, "differ in bias_gain"),
        ({"mapping__fc0": {"bias_gain": "x"}}, "is no number"),
        ({"synthesis__b8__conv1": {"activation": "relu"}}, "has the activation relu"),
        ({"synthesis__b8": {"_parameters": 3}}, "no dictionary"),
        ({"synthesis__b8": {"_parameters": {"extra": 3}}}, "no tensor"),
        ({"synthesis__b8": {"_modules": {"attention": 3}}}, "no dictionary"),
        ({"mapping": {"_buffers": {"extra": torch.ones(1)}}}, "mapping.extra"),
    ],
)
def test_modules_that_differ_are_refused(
    tmp_path: Path, attributes: dict[str, Any], reason: str
) -> None:
    assert reason in fault(tmp_path, files.pickle_nvidia(files.nvidia_objects(**attributes)))


def test_stylegan3_is_named(tmp_path: Path) -> None:
    tree = files.module_tree({"synthesis.input.weight": np.ones((2, 2), np.float32)}, {})
    message = fault(tmp_path, files.pickle_nvidia({"G_ema": tree}))
    assert "StyleGAN3 is not supported" in message


def test_a_discriminator_that_differs_is_left_out_and_said(tmp_path: Path) -> None:
    objects = files.nvidia_objects()
    objects["D"] = files.module_tree({"b4.attention.weight": np.ones((2, 2), np.float32)}, {})
    path = place(tmp_path, files.pickle_nvidia(objects))
    said: list[str] = []
    found = load(path, said.append)
    assert found.discriminator is None
    assert any("discriminator can't be used" in line for line in said)
    assert load(path, said.append).notes == found.notes
    objects_tf = list(files.tensorflow_objects())
    objects_tf[1] = objects_tf[2]
    assert read(tmp_path, files.pickle_tensorflow(tuple(objects_tf))).discriminator is None
    objects_r = files.rosinality_objects()
    objects_r["d"] = {"convs.9.conv1.0.weight": torch.ones(2, 2, 3, 3)}
    assert read(tmp_path, files.save_torch(objects_r)).discriminator is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nonlinearity": "relu"}, "nonlinearity"),
        ({"normalize_latents": False}, "normalize_latents"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"mapping_lrmul": "x"}, "mapping_lrmul is no number"),
        ({"resample_kernel": None}, "resample_kernel"),
        ({"resample_kernel": [1, "x"]}, "resample_kernel"),
    ],
)
def test_tensorflow_options_that_would_change_the_result_are_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    message = fault(tmp_path, files.pickle_tensorflow(files.tensorflow_objects(**change)))
    assert reason in message


def test_tensorflow_networks_of_another_make_are_refused(tmp_path: Path) -> None:
    objects = files.tensorflow_objects()
    gs = objects[2]
    refusals = []
    for change in (
        {"version": 3},
        {"variables": 3},
        {"variables": [3]},
        {"variables": [("x" * 300, np.float32(0))]},
        {"variables": [("lod", np.float32(2))]},
        {"variables": [("dlatent_avg", np.ones(16, np.float32)), ("else", np.float32(0))]},
        {"components": {str(number): gs for number in range(9)}},
        {"components": {"x" * 200: gs}},
    ):
        changed = files._Network({**gs.state, **change})
        refusals.append(fault(tmp_path, files.pickle_tensorflow((*objects[:2], changed))))
    assert "StyleGAN (1)" in refusals[0]
    assert "growing" in refusals[4]
    assert "else" in refusals[5]
    assert "three networks" in fault(tmp_path, files.pickle_tensorflow(objects[:2]))
    concatenated = [("LabelConcat/weight", np.ones((2, 2), np.float32))]
    mapping = files._Network(files.network_state(concatenated, {}, "G_mapping", {}))
    changed = files._Network({**gs.state, "components": {"mapping": mapping}})
    assert "conditional" in fault(tmp_path, files.pickle_tensorflow((*objects[:2], changed)))


def test_progressively_grown_networks_use_their_last_image_layer(tmp_path: Path) -> None:
    g, _, gs = files.tensorflow_objects()
    synthesis = gs.state["components"]["synthesis"]
    grown = []
    for name, value in synthesis.state["variables"]:
        side, _, part = name.partition("/ToRGB/")
        lod = {"16x16": 0, "8x8": 1, "4x4": 2}.get(side)
        grown.append((f"ToRGB_lod{lod}/{part}" if part else name, value))
    synthesis.state["variables"] = [*grown, ("lod", np.float32(0))]
    d = files.tensorflow_objects()[1]
    d.state["variables"] = [
        (name.replace("16x16/FromRGB", "FromRGB_lod0"), value)
        for name, value in d.state["variables"]
    ]
    found = read(tmp_path, files.pickle_tensorflow((g, d, gs)))
    assert found.generator.architecture == "orig"
    assert found.discriminator is not None
    original = files.read_numbers("tensorflow/G")["synthesis/16x16/ToRGB/bias"]
    np.testing.assert_array_equal(found.tensors["synthesis.16.to_rgb.bias"], original)


def test_a_conditional_network_of_tensorflow(tmp_path: Path) -> None:
    g, d, gs = files.tensorflow_objects()
    rng = np.random.default_rng(0)
    label = rng.standard_normal((3, 16)).astype(np.float32)
    wide = rng.standard_normal((32, 16)).astype(np.float32)
    mapping = gs.state["components"]["mapping"].state
    mapping["variables"] = [
        (name, wide if name == "Dense0/weight" else value) for name, value in mapping["variables"]
    ] + [("LabelEmbed/weight", label), ("LabelEmbed/bias", label[0])]
    channels = 16
    d.state["variables"] = [
        (name, np.ones((channels, 16), np.float32) if name == "Output/weight" else value)
        for name, value in d.state["variables"]
        if name != "Output/bias"
    ] + [
        ("Output/bias", np.ones(16, np.float32)),
        ("LabelEmbed/weight", label),
        ("LabelEmbed/bias", label[0]),
        ("Mapping0/weight", rng.standard_normal((16, 16)).astype(np.float32)),
        ("Mapping0/bias", label[0]),
    ]
    found = read(tmp_path, files.pickle_tensorflow((g, d, gs)))
    assert (found.generator.c_dim, found.generator.z_dim) == (3, 16)
    np.testing.assert_array_equal(found.tensors["mapping.embed.weight"], label.T)
    assert found.discriminator is not None
    assert found.discriminator.c_dim == 3
    assert found.discriminator.mapping_layers == 1


def test_what_rosinality_leaves_out_is_made_and_said(tmp_path: Path) -> None:
    state = files.rosinality_objects()["g_ema"]
    for name in [name for name in state if name.startswith("noises.")]:
        del state[name]
    found = read(tmp_path, files.save_torch({"g_ema": state}))
    again = read(tmp_path, files.save_torch({"g_ema": state}, stream=True))
    assert len(found.notes) == 2
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name
    assert found.tensors["synthesis.16.conv1.noise"].std() == pytest.approx(1, abs=0.2)
    generator = StyleGAN2(str(place(tmp_path, files.save_torch({"g_ema": state}))))
    z = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(3))
    mean = generator.mapping(z).reshape(20_000, -1, 16)[:, 0].mean(0)
    torch.testing.assert_close(found.tensors["mapping.w_avg"], mean, rtol=0, atol=0.1)


def test_a_conditional_generator_without_w_avg_is_refused() -> None:
    config = types.SimpleNamespace(c_dim=2)
    with pytest.raises(RefusedError, match="conditional"):
        average_w(config, {})  # type: ignore[arg-type]


def test_filters_are_found(tmp_path: Path) -> None:
    def with_filter(kernel: np.ndarray) -> bytes:
        state = files.rosinality_objects()["g_ema"]
        for name in state:
            if name.endswith(".kernel"):
                state[name] = torch.from_numpy(kernel.astype(np.float32))
        return files.save_torch({"g_ema": state})

    found = read(tmp_path, with_filter(np.outer([1, 2, 1], [1, 2, 1])))
    assert found.generator.resample_filter == pytest.approx((0.25, 0.5, 0.25))
    assert "not separable" in fault(tmp_path, with_filter(np.eye(3)))
    assert "not separable" in fault(tmp_path, with_filter(np.zeros((3, 3))))
    assert "a filter has the shape" in fault(tmp_path, with_filter(np.ones((1, 3, 3))))
    state = files.rosinality_objects()["g_ema"]
    state["to_rgbs.0.upsample.kernel"] = torch.ones(2, 2)
    assert "different filters" in fault(tmp_path, files.save_torch({"g_ema": state}))


def change_ema(**changes: torch.Tensor | None) -> bytes:
    state: dict[str, Any] = dict(files.rosinality_objects()["g_ema"])
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return files.save_torch({"g_ema": OrderedDict(state)})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conv1__activate__bias": None}, "lacks synthesis.4.conv1.bias"),
        ({"conv1__conv__weight": None}, "none of a StyleGAN2's layers|some resolutions"),
        ({"style__1__weight": None}, "no mapping network"),
        ({"style__x__weight": torch.ones(1)}, "style.x.weight"),
        ({"convs__0__else": torch.ones(1)}, "convs.0.else"),
        ({"conv1__conv__weight": torch.ones(2, 3, 4)}, r"the shape \[2, 3, 4\]"),
        ({"conv1__conv__weight": torch.ones(2, 3, 4, 3, 3)}, r"the shape \[2, 3, 4, 3, 3\]"),
        ({"to_rgb1__bias": torch.ones(3)}, r"the shape \[3\]"),
        ({"conv1__activate__bias": torch.ones(5)}, "the other tensors ask for"),
        ({"conv1__activate__bias": torch.full((16,), float("nan"))}, "not finite"),
        ({"conv1__activate__bias": torch.full((16,), 1e300, dtype=torch.float64)}, "not finite"),
        ({"conv1__activate__bias": torch.ones(16).long()}, "not floating-point"),
        ({"style__1__weight": torch.ones(16)}, r"mapping.layers.0.weight has the shape \[16\]"),
        ({"style__1__weight": torch.ones(9000, 16)}, "mapping_features: 9000"),
    ],
)
def test_networks_that_do_not_add_up_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], reason: str
) -> None:
    import re

    assert re.search(reason, fault(tmp_path, change_ema(**changes)))


def test_storages_may_be_half_shared_or_strided(tmp_path: Path) -> None:
    plain = files.rosinality_objects()["g_ema"]
    bias = plain["conv1.activate.bias"].clone()
    both = torch.stack([bias, bias]).T.contiguous()
    found = read(tmp_path, change_ema(conv1__activate__bias=both[:, 1]))
    assert torch.equal(found.tensors["synthesis.4.conv1.bias"], bias)
    found = read(tmp_path, change_ema(conv1__activate__bias=bias.bfloat16()))
    assert torch.equal(found.tensors["synthesis.4.conv1.bias"], bias.bfloat16().float())
    found = read(tmp_path, change_ema(conv1__activate__bias=bias.double()))
    assert torch.equal(found.tensors["synthesis.4.conv1.bias"], bias)


def test_numpy_layouts(tmp_path: Path, valid: dict[str, bytes]) -> None:
    wanted = read(tmp_path, valid["tensorflow"]).tensors
    for change in (
        lambda array: np.asfortranarray(array),
        lambda array: array.astype(">f4"),
        lambda array: array.astype(np.float64),
    ):
        for protocol in (4, 5):
            objects = files.tensorflow_objects()
            mapping = objects[2].state["components"]["mapping"].state
            mapping["variables"] = [(name, change(value)) for name, value in mapping["variables"]]
            found = read(tmp_path, files.pickle_tensorflow(objects, protocol)).tensors
            for name, tensor in wanted.items():
                assert torch.equal(tensor, found[name]), name


def scripted() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


def zipped(method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"hello\nworld\n", "a text file"),
        ("Übergröße\n".encode() * 500, "a text file"),
        (b"<!DOCTYPE html><html>404", "a web page"),
        (b"\n\n<HTML><head>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"\x1f\x8b\x08\0\0", "a gzip archive"),
        (b"x" * 257 + b"ustar" + b"\0" * 300, "a tar archive"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x08\x07\x12\x07pytorch", "ONNX"),
        (b"PK\x05\x06" + b"\0" * 18, "zip file"),
        (b"PK\x03\x04" + b"\0" * 40, "truncated"),
        (b"\xff\xfe\xfd\xfc", "of no known kind"),
        (b"\x80\x04", "truncated"),
        (b"\x80\x09.", "of no known kind"),
        (zipped(a=b"1"), "not one that torch saved"),
        (zipped(zipfile.ZIP_DEFLATED, a=b"1" * 99), "compressed"),
        (pickle.dumps([1, 2, 3]), "no StyleGAN2 generator"),
        (pickle.dumps({"weights": 3}), "but: weights"),
        (pickle.dumps({}), "nothing with a name"),
        (pickle.dumps({1: 2}) + b"more", "4 bytes follow"),
        (files.save_torch({"encoder.weight": torch.ones(2)}), "but: encoder.weight"),
        (files.save_torch(torch.ones(2)), "no StyleGAN2 generator"),
        (b"\x02\0\0\0\0\0\0\0{}", "not one that lmexp made"),
        (b"\xff\0\0\0\0\0\0\0{}", "truncated"),
        (scripted(), "TorchScript"),
    ],
)
def test_other_files_are_told_in_one_line(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reason in fault(tmp_path, data)


def test_truncated_files_are_refused(tmp_path: Path, valid: dict[str, bytes]) -> None:
    for name, data in valid.items():
        for part in (0.1, 0.5, 0.9, 0.999):
            assert "fetch it again" in fault(tmp_path, data[: int(part * len(data))]), name


def test_paths_that_are_no_files(tmp_path: Path, valid: dict[str, bytes]) -> None:
    with pytest.raises(LmexpError, match="a folder"):
        load(tmp_path, print)
    with pytest.raises(LmexpError, match="can't be read"):
        load(tmp_path / "none", print)
    with pytest.raises(LmexpError, match="can't be read"):
        load(Path("a\0b"), print)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LmexpError, match="it is no file"):
        load(tmp_path / "pipe", print)
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(LmexpError, match="it is no file"):
        load(tmp_path / "link", print)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(LmexpError, match="can't be read"):
        load(tmp_path / "loop", print)
    # Caches of downloads are made of links to regular files.
    (tmp_path / "good").symlink_to(place(tmp_path, valid["tensorflow"]))
    assert load(tmp_path / "good", lambda _message: None).kind == "stylegan2-tensorflow"


def test_a_file_is_converted_once(tmp_path: Path, valid: dict[str, bytes]) -> None:
    path = place(tmp_path, valid["nvidia"])
    said: list[str] = []
    first = load(path, said.append)
    assert len(said) == 1
    second = load(path, said.append)
    assert len(said) == 1
    assert first.generator == second.generator
    assert first.discriminator == second.discriminator
    assert (second.kind, second.source_sha256) == (first.kind, first.source_sha256)
    assert second.parameters == sum(value.numel() for value in first.tensors.values())
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    (copy,) = (tmp_path / "cache" / "checkpoints").glob("*.safetensors")
    assert first.source_sha256 in copy.name
    damaged = bytearray(copy.read_bytes())
    damaged[-2] ^= 1
    copy.write_bytes(damaged)
    third = load(path, said.append)
    assert "damaged" in said[1]
    assert torch.equal(third.tensors["synthesis.const"], first.tensors["synthesis.const"])
    assert load(copy, said.append).kind == first.kind


def test_a_cache_that_cannot_be_used_is_told(
    tmp_path: Path, valid: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMEXP_CACHE", str(place(tmp_path, b"x", "occupied")))
    with pytest.raises(LmexpError, match="LMEXP_CACHE"):
        load(place(tmp_path, valid["nvidia"]), print)


def test_a_file_that_changes_meanwhile_is_told(
    tmp_path: Path, valid: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(tmp_path, valid["nvidia"])
    once = checkpoints._load_converted

    def change_first(path: Path, source: str, say: Any) -> Checkpoint:
        path.write_bytes(valid["tensorflow"])
        return once(path, source, say)

    monkeypatch.setattr(checkpoints, "_load_converted", change_first)
    with pytest.raises(LmexpError, match="changed while it was read"):
        load(path, lambda _message: None)


def rewrite(source: Path, out: Path, **metadata: str | None) -> Path:
    """A safetensors file with other metadata."""
    with safe_open(source, framework="pt") as file:
        found = {**file.metadata(), **metadata}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, out, {key: value for key, value in found.items() if value is not None})
    return out


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"format": "pt"}, "not one that lmexp made"),
        ({"format_version": "99"}, "version 99"),
        ({"generator": "{"}, "no JSON"),
        ({"generator": None}, "no JSON"),
        ({"discriminator": None}, "has an unknown discriminator"),
        ({"content_sha256": "0"}, "its content is not what was written"),
        ({"notes": "{}"}, "metadata is damaged"),
        ({"notes": "x"}, "metadata is damaged"),
    ],
)
def test_our_own_files_are_validated(
    tmp_path: Path, valid: dict[str, bytes], metadata: dict[str, str | None], reason: str
) -> None:
    good = tmp_path / "good.safetensors"
    write(read(tmp_path, valid["nvidia"]), good)
    with pytest.raises(LmexpError, match=reason):
        load(rewrite(good, tmp_path / "bad", **metadata), print)


def test_validate_holds_tensors_against_the_config(tmp_path: Path, valid: dict[str, bytes]) -> None:
    good = read(tmp_path, valid["nvidia"])
    validate(good)
    for change, reason in (
        ({"synthesis.const": None}, "lacks synthesis.const"),
        ({"synthesis.const": torch.ones(2)}, "expected float32"),
        ({"synthesis.const": good.tensors["synthesis.const"].double()}, "expected float32"),
        ({"synthesis.const": good.tensors["synthesis.const"] / 0}, "not finite"),
    ):
        tensors = {**good.tensors, **change}
        bad = Checkpoint(
            good.generator,
            {name: value for name, value in tensors.items() if value is not None},
            good.discriminator,
            good.kind,
            good.source_sha256,
        )
        with pytest.raises(RefusedError, match=reason):
            validate(bad)


def test_writing_where_nothing_can_be_written(tmp_path: Path, valid: dict[str, bytes]) -> None:
    with pytest.raises(LmexpError, match="can't be written"):
        write(read(tmp_path, valid["nvidia"]), tmp_path / "none" / "x.safetensors")


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_converts_and_says_what_it_found(
    tmp_path: Path, valid: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("convert_checkpoint")
    source, out = place(tmp_path, valid["nvidia"]), tmp_path / "made.safetensors"
    assert script.main([str(source), str(out)]) == 0
    said = capsys.readouterr().out
    for part in ("stylegan2-ada-pytorch", "16 px", "num_ws      6", "sha256", "resnet"):
        assert part in said
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["generator"])["resolution"] == 16
    before = out.read_bytes()
    assert script.main([str(source), str(out)]) == 2
    assert "it exists" in capsys.readouterr().err
    assert out.read_bytes() == before
    other = place(tmp_path, valid["rosinality-zip"], "other.pt")
    assert script.main([str(other), str(out), "--force"]) == 0
    assert "rosinality" in capsys.readouterr().out
    assert load(out, print).kind == "rosinality"


@pytest.mark.parametrize(
    ("source", "out", "reason"),
    [
        ("page.html", "made.safetensors", "a web page"),
        ("none.pkl", "made.safetensors", "can't be read"),
        ("page.html", "made.pt", "end the name in .safetensors"),
        ("page.html", "none/made.safetensors", "no such folder"),
        ("page.html", "folder.safetensors", "it is a folder"),
        ("self.safetensors", "self.safetensors", "the file to be converted"),
        ("page.html", "dangling.safetensors", "it exists"),
    ],
)
def test_the_script_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, out: str, reason: str
) -> None:
    place(tmp_path, b"<html>", "page.html")
    place(tmp_path, b"x", "self.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    script = load_script("convert_checkpoint")
    assert script.main([str(tmp_path / source), str(tmp_path / out)]) == 2
    said = capsys.readouterr()
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert not said.out
    assert not (tmp_path / "nowhere").exists()
