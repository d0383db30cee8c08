"""Each mistake on the command line: one line, which names the key and the way out; no work done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmexp import cli


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["lmexp", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.stepz=3"], ["optimizer.stepz", "did you mean 'steps'"]),
        (["optimiser.steps=3"], ["optimiser.steps", "no such key", "did you mean 'optimizer'"]),
        (["generator=mobile_265"], ["generator=mobile_265", "mobile_256", "mobile_1024"]),
        (["loss=[lpipz]"], ["loss=lpipz", "did you mean 'lpips'"]),
        (["+sweep=wieghts"], ["sweep=wieghts", "did you mean 'weights'"]),
        (["loss.lpips.weight=-1"], ["loss.lpips.weight", "greater than or equal to 0", "-1"]),
        (["loss.lpips.weight=heavy"], ["loss.lpips.weight", "number", "heavy"]),
        (["loss.landmarks.norm=l3"], ["loss.landmarks.norm", "'l1' or 'l2'", "l3"]),
        (["+loss.lpips.wieght=1"], ["loss.lpips.wieght", "did you mean 'weight'"]),
        (["optimizer.steps=0"], ["optimizer.steps", "greater than or equal to 1"]),
        (["optimizer.steps=1.5"], ["optimizer.steps", "integer", "1.5"]),
        (["landmark_weights.jaw=-0.1"], ["landmark_weights.jaw", "greater than or equal to 0"]),
        (["landmark_weights.lips=1"], ["landmark_weights.lips", "outer_lip", "inner_lip"]),
        (["landmark_weights=smile"], ["landmark_weights=smile", "uniform", "mouth"]),
        (["latent.space=z"], ["latent.space", "'w' or 'w_plus'"]),
        (["hardware.device=tpu"], ["hardware.device", "cpu, cuda"]),
        (
            ["latent.head_start=1", "latent.head_start_ws=[4,4]"],
            ["latent: head_start_ws", "head_start to 0"],
        ),
        (["latent.moving_ws=[4,4]"], ["latent: moving_ws", "less than"]),
        (["latent=w", "latent.moving_ws=[2,9]"], ["latent: moving_ws", "latent=w_plus"]),
        (["latent.starts=0"], ["latent.starts", "greater than or equal to 1"]),
        (["latent.starts=2", "latent.starts_spread=0"], ["latent: starts_spread", "above 0"]),
        (
            ["hardware.batch_size=atuo"],
            ["hardware.batch_size", "integer", "or 'auto' (got 'atuo')"],
        ),
        (["hardware.batch_size=0"], ["hardware.batch_size", "greater", ", or 'auto' (got 0)"]),
        (["optimizer.patience=0"], ["optimizer.patience", "greater than or equal to 1"]),
        (["latent.inversion.patience=5"], ["latent.inversion.patience"]),
        (
            ["optimizer.group_factors={jaww: 20}", "optimizer.landmark_ramp=0.5"],
            ["optimizer.group_factors:", "'jaww'", "did you mean 'jaw'", "inner_lip"],
        ),
        (
            ["optimizer.group_factors={jaw: -1}", "optimizer.landmark_ramp=0.5"],
            ["optimizer.group_factors.jaw", "greater than or equal to 0", "-1"],
        ),
        (
            ["optimizer.group_factors={jaw: inf}", "optimizer.landmark_ramp=0.5"],
            ["optimizer.group_factors.jaw", "finite"],
        ),
        (
            ["optimizer.group_factors={jaw: nan}", "optimizer.landmark_ramp=0.5"],
            ["optimizer.group_factors.jaw", "finite"],
        ),
        (
            ["optimizer.group_factors={jaw: 20}"],
            ["optimizer.group_factors:", "landmark_ramp=0 ", "above 0", "group_factors=null"],
        ),
        (
            ["optimizer.group_factors={}", "optimizer.landmark_ramp=0.5"],
            ["optimizer.group_factors:", "names no landmark group", "null"],
        ),
        (["optimizer.group_factors=20"], ["optimizer.group_factors:", "mapping", "20"]),
        (
            ["optimizer.group_factors.jaw=20"],
            ["optimizer.group_factors.jaw:", "'optimizer.group_factors={jaw: VALUE}'"],
        ),
        (["latent.inversion.group_factors={jaw: 2}"], ["latent.inversion.group_factors"]),
        (["inputs=photos"], ["inputs", "look"]),
        (["inputs.look=missing.jpg"], ["inputs.look", "missing.jpg", "no file"]),
        (["inputs.look=generated:x"], ["inputs.look", "generated:7"]),
        (["inputs.look=sample:moon"], ["inputs.look", "astronaut"]),
        (
            [
                "loss.lpips.weight=0",
                "loss.landmarks.weight=0",
                "loss.coordinates.weight=0",
                "loss.identity.weight=0",
                "loss.prior.weight=0",
                "loss.noise.weight=0",
            ],
            ["nothing to optimise"],
        ),
        (["steps"], ["steps: no value", "steps=VALUE"]),
        (["optimizer.steps=[1"], ["optimizer.steps: [1 cannot be read", "'KEY=[a,b]'"]),
        (["seed=0,1"], ["seed: 0,1 is several values", "add -m", "'seed=[0,1]'", "'seed=\"0,1\"'"]),
        (["sweep=weights"], ["sweep: not part of the default config", "+sweep="]),
        (["inputs.look=ä (1),b=c.jpg"], ["inputs.look", "ä (1),b=c.jpg", "no file"]),
        (["seed=-1", "--cfg", "job", "optimizer.stepz=3"], ["optimizer.stepz", "'steps'"]),
        (["optimizer="], ["optimizer", "published"]),
        (["+experiment=reference"], ["experiment", "without the +"]),
        (["loss=[lpips]", "loss.prior.weight=1"], ["loss.prior.weight", "leave this key out"]),
        (["judge=fan_slim"], ["judge: is a group of keys", "fan_slim"]),
        (["+smile=3"], ["smile", "no such key", "generator"]),
        (["~generator"], ["generator: missing"]),
        (["inputs.look="], ["inputs.look", "at least 1 character"]),
        (["inputs.face=-1"], ["inputs.face:", "greater than or equal to 0", "-1"]),
        (["inputs.face=[0]"], ["inputs.face.1: missing"]),
        (["loss.lpips.mask=[mouht]"], ["loss.lpips.mask.0", "'mouth'", "mouht"]),
        (["generator._target_=lmexp.Nothing"], ["generator", "lmexp.Nothing", "imported"]),
        (["optimizer.learning_rate=inf"], ["optimizer.learning_rate", "finite"]),
        (["seed=-1", "optimizer.steps=0"], ["optimizer.steps", "(and 1 more)"]),
        (["seed=${nothing}"], ["nothing"]),
        (["inputs.look=a${b}.jpg"], ["inputs.look: ", "'b' not found", "if there is that file"]),
        (["-m", "inputs.look=a${b}.jpg,c.jpg"], ["'b' not found", "if there is that file"]),
        (["loss=[landmarks]"], ["latent.start", "lpips", "latent.start=mean"]),
        (["seed=-1"], ["seed", "greater than or equal to 0"]),
        (["+optimizer.steps=3"], ["optimizer.steps", "without the +"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_one_line(
    words: list[str],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fail(monkeypatch, capsys, *words)
    for part in said:
        assert part in line, line
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_sweep_names_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fail(monkeypatch, capsys, "-m", "optimizer.steps=5,0")
    assert "job 2" in line and "optimizer.steps=0" in line
    line = fail(monkeypatch, capsys, "-m", "landmark_weights=reference,smile")
    assert "landmark_weights=smile" in line and "uniform" in line
    assert list(tmp_path.iterdir()) == []
