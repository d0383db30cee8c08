"""The benchmark: its yardstick computes our losses, its counts are right, its files are whole."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lmexp.composition import conf_folder
from lmexp.errors import LmexpError
from lmexp.losses.perceptual.protocol import load_network
from lmexp.projection import Step, project
from lmexp.weights import store

SCRIPTS = conf_folder().parent / "scripts"
NAMES = ("", "_cells", "_limits", "_plots", "_tables", "_weights", "_yardstick")


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The benchmark's modules, found as its own command finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        modules = {name: importlib.import_module(f"benchmark{name}") for name in NAMES}
        yield SimpleNamespace(**{name.lstrip("_") or "main": m for name, m in modules.items()})


def settings(scripts: SimpleNamespace, *overrides: str, **values: object) -> object:
    values = {
        "random_weights": True,
        "windows": 2,
        "window": 1,
        "warm_up": 1,
        "repeats": 1,
    } | values
    return scripts.cells.Settings(overrides=("hardware.threads=1", *overrides), **values)


def test_yardstick_computes_the_same_losses(scripts: SimpleNamespace) -> None:
    """Textbook modulation and torch's Adam, step by step; the terms are of one magnitude."""
    cell = scripts.cells.Cell("yardstick", "tiny", 32, "cpu")
    slow = ["optimizer.learning_rate=0.005"]  # a high rate magnifies rounding: docs/reference.md
    with scripts.weights.random_weights():
        bench = scripts.cells.Bench(cell, settings(scripts, "loss.noise.weight=10", *slow))
        plain: list[float] = []
        ours: list[dict[str, float]] = []

        def keep(step: Step) -> None:
            losses = step.losses.weighted | {"total": step.losses.total}
            ours.append({name: loss.item() for name, loss in losses.items()})

        with torch.no_grad():
            synthesis, _ = scripts.yardstick.choose(True, bench.terms, bench.plain, bench.targets)
            ws = bench.start.ws.expand(-1, bench.plain.generator.num_ws, -1)
            noise = bench.start.noise_bufs
            assert torch.allclose(
                synthesis(ws, noise), bench.plain.generator.synthesis(ws, noise), atol=2e-5
            )
        found = bench.run_yardstick(4, lambda _, total: plain.append(total.item()))
        latents = project(
            bench.plain,
            bench.objective(bench.plain),
            bench.start,
            bench.schedule(4),
            seeds=[0],
            callback=keep,
        )
    assert min(ours[0][name] / ours[0]["total"] for name in ours[0]) > 0.02
    assert plain[0] == pytest.approx(ours[0]["total"], rel=1e-5)
    assert plain == pytest.approx([losses["total"] for losses in ours], rel=1e-3)
    assert plain[-1] != pytest.approx(plain[0], rel=0.01)  # it moved
    assert torch.allclose(found.ws, latents.ws, atol=5e-3)


def test_census_counts_forward_and_backward(scripts: SimpleNamespace) -> None:
    weight = torch.randn(8, 4, 3, 3)

    def work(rows: int) -> None:
        x = torch.randn(rows, 4, 10, 10, requires_grad=True)
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y.sum(), x)

    one, two = (scripts.limits.take_census(lambda rows=rows: work(rows)) for rows in (1, 2))
    product = 2 * 8 * 4 * 9 * 100
    assert [operation.flops for operation in one] == [product, product]
    # Forward it reads x and the weights and writes y; backward dy, x, weights, dx.
    x, y = 4 * 100, 8 * 100
    assert one[0].numbers == x + weight.numel() + y
    assert one[1].numbers >= y + weight.numel() + x
    five = scripts.limits.extrapolate(one, two, 5)
    assert five == scripts.limits.take_census(lambda: work(5))
    with pytest.raises(ValueError, match="operations"):
        scripts.limits.extrapolate(one, two[:1], 5)
    # Arithmetic bounds one operation, traffic another: the limit is more than either sum.
    operation = scripts.limits.Operation
    least = scripts.limits.limit(
        [operation(flops=100, numbers=1), operation(flops=1, numbers=100)],
        scripts.limits.Rates(flops=10, bytes=20),
        number_size=2,
    )
    assert least == {"flops": 101, "arithmetic": 10.1, "traffic": 10.1, "limit": 20}


def test_random_weights_answer_for_third_parties_alone(scripts: SimpleNamespace) -> None:
    real = store.load("fan_68_slim").sha256
    with scripts.weights.random_weights(stacks=1) as asked:
        trunk = load_network("lpips_vgg")
        fan = store.load("face_alignment_2dfan4").tensors
        assert store.load("fan_68_slim").sha256 == real
        features = trunk.features(torch.rand(1, 3, 32, 32))
    assert asked == ["torchvision_vgg16", "face_alignment_2dfan4"]
    assert [layer.shape[1] for layer in features] == [64, 128, 256, 512, 512]
    assert all(0.1 < float(layer.std()) < 10 for layer in features)

    from face_alignment.models import FAN

    state = FAN(1).state_dict()
    wanted = {key: value.shape for key, value in state.items() if "num_batches" not in key}
    assert {key: value.shape for key, value in fan.items()} == wanted


def test_every_packaged_network_takes_its_random_weights(scripts: SimpleNamespace) -> None:
    from lmexp.generators.mobile_stylegan import MobileStyleGAN
    from lmexp.losses import identity_network

    def spread(made: Tensor) -> float:
        return float(made.std())

    with scripts.weights.random_weights(), torch.no_grad():
        generator = MobileStyleGAN(256)
        w = generator.mapping(torch.randn(1, generator.z_dim))
        images = generator.synthesis(w[:, None].expand(-1, generator.num_ws, -1))
        pictures = torch.rand(1, 3, 64, 64)
        for name in ("stlpips_alex", "hed_vgg16"):
            assert all(spread(layer) > 1e-3 for layer in load_network(name).features(pictures))
        assert 1e-3 < spread(identity_network.load()(torch.rand(1, 3, 112, 112))) < 100
    assert images.isfinite().all() and spread(images) > 1e-3


def test_a_step_its_parts_and_its_tables(
    scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cell = scripts.cells.Cell("step", "tiny", 32, "cpu", 2, parts=True)
    waited: list[float] = []
    report = scripts.cells.measure(
        cell, settings(scripts), time.time(), lambda: waited.append(time.time())
    )
    assert len(waited) == 1
    assert len(report["seconds_per_step"]) == 2 and min(report["seconds_per_step"]) > 0
    assert report["start_seconds"] > 0 and report["build_seconds"] > 0
    assert set(report["parts"]) == {"generator", "lpips", "landmarks", "noise"}
    fan, noise = report["parts"]["landmarks"], report["parts"]["noise"]
    assert fan["seconds"] > 0 and fan["limit"] >= max(fan["arithmetic"], fan["traffic"]) > 0
    assert noise["flops"] == 0
    assert report["random_weights"] == ["torchvision_vgg16"]

    yardstick = report | {"kind": "yardstick", "batch": 1, "parts": False}
    yardstick["seconds_per_step"] = [2 * max(report["seconds_per_step"])]
    two = report | {"devices": 2, "second_start_seconds": 1.5, "second_build_seconds": 2.0}
    larger = report | {"resolution": 64}
    failed = dataclasses.asdict(cell) | {"name": "another", "failed": "out of memory"}
    whole = report | {"batch": 4, "name": "a third", "parts": "RuntimeError: no graph"}
    cells = [report, yardstick, two, larger, failed, whole]
    results = {
        "cells": cells,
        "date": "today",
        "revision": {"revision": "0123456789", "dirty": False},
        "settings": {"random_weights": True},
    }
    scripts.tables.print_tables(results)
    printed = capsys.readouterr().out
    assert "revision 0123456; random weights" in printed
    assert "not measured: another: out of memory" in printed
    assert "parts not measured: a third: RuntimeError: no graph" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| tiny   | 32 | cpu "))
    ratio = float(row.split("|")[8])
    each = sorted(report["seconds_per_step"])
    mean = sum(each) / 4  # of two windows and two jobs
    assert ratio == pytest.approx(2 * each[-1] / mean, abs=0.06)
    assert "**whole step**" in printed and " 4 " in printed

    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    assert scripts.main.main(["--plot", str(path), "--out", str(tmp_path / "speed")]) == 0
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".png", ".pdf"}
    assert scripts.main.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out.endswith(printed)
    path.write_text("[]")
    with pytest.raises(LmexpError, match="not a result of the benchmark"):
        scripts.plots.draw_plots([path], tmp_path / "speed")
    path.write_text(json.dumps(results | {"cells": []}))
    with pytest.raises(LmexpError, match="no step was measured"):
        scripts.plots.draw_plots([path], tmp_path / "speed")


def test_agreement_with_float32(scripts: SimpleNamespace, tmp_path: Path) -> None:
    """In bfloat16 the losses differ, by little; the picture shows both."""
    cell = scripts.cells.Cell("agreement", "tiny", 32, "cpu", 1)
    chosen = settings(
        scripts, "hardware.precision=bfloat16", agreement_steps=2, pictures=str(tmp_path)
    )
    report = scripts.cells.measure(cell, chosen, time.time())
    off = report["relative_difference"]
    assert set(off) == {"lpips", "landmarks", "noise", "total"}
    assert 1e-6 < off["lpips"]["largest"] < 0.1
    assert off["lpips"]["mean"] > report["relative_difference_of_a_hair"]["lpips"]["mean"]
    assert report["picture"] == "tiny_32_cpu.png"
    with Image.open(tmp_path / report["picture"]) as picture:
        assert picture.size == (5 * 32, 32)
    results = {"cells": [report], "date": "", "revision": None, "settings": {}}
    table = scripts.tables.agreement(results["cells"])
    assert [row[1] for row in table[1:]] == list(off)


def test_command_measures_in_a_process_of_its_own(
    scripts: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """One that is measured, and one for which no time is left."""
    measured = scripts.cells.Cell("yardstick", "tiny", 32, "cpu")
    late = scripts.cells.Cell("step", "tiny", 32, "cpu")
    monkeypatch.setattr(scripts.main, "choose_cells", lambda args: [measured, late])
    out = tmp_path / "results.json"
    line = "--windows 2 --window 1 --warm-up 1 --random-weights --budget 0.01"
    status = scripts.main.main([*line.split(), "--set", "hardware.threads=1", "--out", str(out)])
    results = json.loads(out.read_text())
    plain, step = results["cells"]
    assert len(plain["seconds_per_step"]) == 2 and plain["seconds_per_step"][0] > 0
    assert plain["start_seconds"] > 0 and plain["random_weights"] == ["torchvision_vgg16"]
    assert torch.__version__.startswith(plain["versions"]["torch"]) and "threads" in plain["device"]
    assert step["failed"] == "no time was left for it" and status == 1
    assert results["command"].startswith("python scripts/benchmark.py --windows 2")
    assert results["command"].endswith("--out results.json") and str(tmp_path) not in str(results)
    assert results["settings"]["overrides"] == ["hardware.threads=1"]
    printed = capsys.readouterr().out
    assert "yardstick on cpu: " in printed and "FAILED: no time was left for it" in printed


def test_a_process_that_fails_leaves_its_last_line(
    scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cell = scripts.cells.Cell("step", "tiny", 32, "cpu")
    (tmp_path / "stderr").write_text("Traceback\nRuntimeError: no more\nAdvice\n")
    report = scripts.main.read_report(cell, tmp_path, "")
    assert report["failed"] == "RuntimeError: no more"
    assert capsys.readouterr().err == "Traceback\nRuntimeError: no more\nAdvice\n"
    assert report["recipe"] == "tiny"
    assert scripts.main.read_report(cell, tmp_path, "not done")["failed"] == "not done"
    args = scripts.main.parse(["--timeout", "0.01"])
    # Killed before it has imported anything.
    (report,) = scripts.main.start(cell, args, settings(scripts), tmp_path)
    assert report["failed"] == "not done after 0 s"


def test_suites_and_what_is_left_of_them(scripts: SimpleNamespace) -> None:
    def chosen(*arguments: str) -> list[object]:
        args: argparse.Namespace = scripts.main.parse(list(arguments))
        found: list[object] = scripts.main.choose_cells(args)
        return found

    on_gpu = scripts.main.full(True)
    assert len({cell.name for cell in on_gpu}) == len(on_gpu)
    assert set(scripts.main.quick(True)) <= set(on_gpu)
    assert {cell.batch for cell in on_gpu if cell.recipe == "mobile"} >= {1, 8, 16, 64}
    if not torch.cuda.is_available():
        assert {cell.recipe for cell in chosen("--suite", "quick", "--recipes", "default")} == {
            "default"
        }
        assert [cell.kind for cell in chosen("--recipes", "tiny")] == ["yardstick", "step"]
        several = chosen("--recipes", "tiny", "--hardware", "cuda_fast", "--gpus", "1", "2")
        assert [cell.devices for cell in several if cell.kind == "step"] == [1, 2]
        assert several[-1].kind == "agreement"
        lowered = ("--recipes", "tiny", "--set", "hardware.precision=bfloat16", "--no-steps")
        assert [cell.kind for cell in chosen(*lowered)] == ["agreement"]
        assert scripts.main.main(["--recipes", "tiny", "--no-steps"]) == 2
        missing = scripts.main.run(several[1], None, None, None)
        assert missing["failed"] == "1 GPUs needed, 0 here"
    assert not [c for c in chosen("--suite", "full", "--no-agreement") if c.kind == "agreement"]
