from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from lmexp import workbench
from lmexp.acceleration import PLAIN, Acceleration
from lmexp.composition import conf_folder
from lmexp.config import MOST_AT_ONCE, Component, Hardware, validate
from lmexp.errors import LmexpError
from lmexp.faces.protocol import FaceBox
from lmexp.faces.store import FaceStore
from lmexp.faces.targets import AlignedFace
from lmexp.workbench import Workbench

TINY = Component.model_validate({"_target_": "lmexp.generators.tiny_random.TinyRandom"})


def hardware(device: str = "cpu", channels_last: bool = False) -> Hardware:
    return Hardware(device=device, batch_size=1, threads=1, channels_last=channels_last)


def test_things_are_built_once() -> None:
    bench = Workbench(hardware())
    assert torch.get_num_threads() == 1
    assert bench.module(TINY) is bench.module(TINY)
    other = Component.model_validate({**TINY.model_dump(by_alias=True), "seed": 1})
    assert bench.module(other) is not bench.module(TINY)


def test_modules_are_frozen_and_in_the_wanted_memory_format() -> None:
    spec = Component.model_validate({"_target_": "lmexp.landmarks.embedded.EmbeddedFan"})
    network = Workbench(hardware(channels_last=True)).module(spec)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    kernels = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert kernels
    assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)


def test_no_gpu_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LmexpError, match=r"hardware\.device: cuda, but .*hardware=cpu"):
        Workbench(hardware("cuda"))


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(LmexpError, match=r"cuda:5, but there are 2 GPUs; choices: cuda:0, cuda:1"):
        Workbench(hardware("cuda:5"))
    assert Workbench(hardware("cuda:1")).device == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize("tuned", [True, False])
def test_whether_cudnn_tries_its_algorithms(monkeypatch: pytest.MonkeyPatch, tuned: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tuned)
    Workbench(hardware("cuda:0").model_copy(update={"tune_convolutions": tuned}))
    assert torch.backends.cudnn.benchmark is tuned


def test_a_photo_is_aligned_once_for_all_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "_BYTES", 256 * 3 * 256**2)  # as 256 of these faces take
    bench = Workbench(hardware())
    made: list[AlignedFace] = []

    def align() -> AlignedFace:
        made.append(face_of(len(made)))
        return made[-1]

    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        config, other = (
            validate(
                compose("config", overrides=[f"landmarks={name}", f"output_dir={tmp_path}/runs"])
            )
            for name in ("fan_slim", "fan_full")
        )
    first = bench.aligned_face(config, "sha", 256, None, align)
    assert bench.aligned_face(config, "sha", 256, None, align) is first
    assert bench.aligned_face(config, "sha", 256, 1, align) is made[-1]
    assert bench.aligned_face(config, "other", 256, None, align) is made[-1]
    assert bench.aligned_face(other, "sha", 256, None, align) is made[-1]
    assert bench.aligned_face(config, "sha", 512, None, align) is made[-1]
    assert len(made) == 5
    for number in range(300):
        bench.aligned_face(config, f"photo {number}", 256, None, align)
    assert len(made) == 305
    assert len(bench._faces) == 256
    # Long forgotten, and still on the disk; so it is for another process.
    for anyone in (bench, Workbench(hardware())):
        again = anyone.aligned_face(config, "sha", 256, None, align)
        assert again is not first and np.array_equal(again.image, first.image)
    assert len(made) == 305
    elsewhere = config.model_copy(update={"output_dir": str(tmp_path / "elsewhere")})
    assert Workbench(hardware()).aligned_face(elsewhere, "sha", 256, None, align) is made[305]


def face_of(number: int) -> AlignedFace:
    random = np.random.default_rng(number)
    return AlignedFace(
        image=random.integers(0, 256, (8, 8, 3), dtype=np.uint8),
        landmarks=random.random((68, 2), dtype=np.float32),
        affine=random.random((2, 3)),
        box=FaceBox(1.5, 2, 30, 40, score=0.7, angle=-20.0),
        photo_size=(640, 480),
        warnings=("a.jpg: it is dark", "a.jpg: „two faces“"),
    )


def test_a_kept_face_comes_back_whole(tmp_path: Path) -> None:
    store = FaceStore(tmp_path / "faces")
    assert store.read("a") is None
    generated = AlignedFace.of_aligned(np.zeros((4, 4, 3), np.uint8), np.ones((68, 2)))
    for key, face in (("a", face_of(1)), ("b", generated)):
        store.write(key, face)
        again = store.read(key)
        assert again is not None
        for field in dataclasses.fields(AlignedFace):
            there, here = getattr(again, field.name), getattr(face, field.name)
            if isinstance(here, np.ndarray):
                assert there.dtype == here.dtype and np.array_equal(there, here)
            else:
                assert there == here
    assert [path.name for path in sorted(store.folder.iterdir())] == ["a.npz", "b.npz"]


@pytest.mark.parametrize("damage", ["cut", "empty", "no archive", "other arrays", "other box"])
def test_a_damaged_face_is_aligned_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaceStore(tmp_path)
    store.write("a", face_of(1))
    path = tmp_path / "a.npz"
    whole = path.read_bytes()
    if damage == "other arrays":
        np.savez(path, image=np.zeros(3))
    elif damage == "other box":
        about = json.dumps({"box": {"left": 1}, "photo_size": None, "warnings": []})
        np.savez(path, image=1, landmarks=1, affine=1, about=np.array(about))
    else:
        path.write_bytes({"cut": whole[:-40], "empty": b"", "no archive": b"x" * 90}[damage])
    with caplog.at_level("WARNING", logger="lmexp"):
        assert store.read("a") is None
    assert [r.getMessage().startswith(f"{path}: cannot be read") for r in caplog.records] == [True]


def test_a_face_that_cannot_be_kept_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level("WARNING", logger="lmexp"):
        FaceStore(tmp_path / "file").write("a", face_of(1))
    assert "an aligned face cannot be kept" in caplog.text


def test_hardware_says_how_steps_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def accelerate(**keys: Any) -> Acceleration:
        return Workbench(hardware().model_copy(update=keys)).acceleration

    assert accelerate() == PLAIN
    assert accelerate(precision="bfloat16", compile=True) == Acceleration(torch.bfloat16, True)
    assert accelerate(graphs=True) == PLAIN  # a CPU in place of the GPU that the config names
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert accelerate(device="cuda", graphs=True).graphs


def test_a_cpu_takes_one_job_at_a_time() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        config, gpu = (
            validate(compose("config", overrides=[f"hardware={name}"])) for name in ("cpu", "cuda")
        )
        with pytest.raises(LmexpError, match=r"graphs: CUDA graphs need a CUDA GPU"):
            validate(compose("config", overrides=["hardware.graphs=true"]))
    assert config.hardware.batch_limit == 1 and Workbench(config.hardware).count_rows(config) == 1
    assert gpu.hardware.batch_limit == MOST_AT_ONCE
