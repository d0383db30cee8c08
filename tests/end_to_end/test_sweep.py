"""Several jobs through the command line: batches, failures, the index, the figures."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, CommandLine, latents, read_index
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from PIL import Image

from lmexp.generators.stylegan2 import StyleGAN2Random
from lmexp.recording.recorder import Recorder
from lmexp.recording.run_folder import RunFolder

QUICK = (*TINY, "recording.video_frames=0")


@pytest.mark.slow
def test_a_sweep_gives_the_same_in_batches_of_one_and_of_three(lmexp: CommandLine) -> None:
    words = [*QUICK, "+sweep=weights", "figure=[weights_grid]"]
    alone = lmexp(*words, "hardware.batch_size=1", "output_dir=alone")
    assert alone.code == 0, alone
    batched = lmexp(*words, "hardware.batch_size=3", "output_dir=batched")
    assert batched.code == 0
    assert "jobs 1–3/9" in batched.err and "jobs 9–9/9" not in batched.err

    (one,), (three,) = (list(Path(root).glob("weights-*")) for root in ("alone", "batched"))
    assert one.name == three.name
    index = read_index(one)
    assert index["jobs"] == read_index(three)["jobs"]
    assert index["name"] == "weights"
    assert [job["overrides"]["landmark_weights"] for job in index["jobs"]] == [
        "whole_face",
        "lips",
        "reference",
        "uniform",
        "mouth",
        "eyes",
        "brows",
        "jaw",
        "still",
    ]
    for job in index["jobs"]:
        assert job["state"] == "finished"
        # float32; in float64 the two are equal, see numerics/test_projection.py.
        difference = np.abs(latents(one / job["folder"]) - latents(three / job["folder"]))
        assert difference.max() < 0.02 and difference.mean() < 1e-3
        pictures = [RunFolder(root / job["folder"]).read_picture("proj") for root in (one, three)]
        assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).max() <= 2
        summary = RunFolder(three / job["folder"]).read_summary()
        assert summary["overrides"] == [f"landmark_weights={job['overrides']['landmark_weights']}"]
    for suffix in ("png", "pdf"):
        assert (one / "figures" / f"weights_grid.{suffix}").stat().st_size > 0
    assert "9 finished" in batched.out and str(three) in batched.out
    different = {latents(one / job["folder"]).tobytes() for job in index["jobs"]}
    assert len(different) == 9


def test_what_all_jobs_share_is_made_once(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def count(name: str) -> None:
        owner, _, attribute = name.rpartition(".")
        kept = getattr(importlib.import_module(owner), attribute)
        monkeypatch.setattr(name, lambda *given: (made.append(attribute), kept(*given))[1])

    count("lmexp.workbench.lay_over")
    count("lmexp.inputs.generate_face")
    load = ConfigLoaderImpl.load_sweep_config
    monkeypatch.setattr(
        ConfigLoaderImpl,
        "load_sweep_config",
        lambda *given: (made.append("load_sweep_config"), load(*given))[1],
    )
    assert lmexp(*QUICK, "figure=[]", "hardware.batch_size=2", "-m", "seed=1,2,3").code == 0
    # Two faces, one pair, Hydra's files.
    assert sorted(made) == ["generate_face", "generate_face", "lay_over", "load_sweep_config"]


def test_one_failing_job_leaves_the_others_alone(lmexp: CommandLine) -> None:
    Image.new("RGB", (300, 300), "grey").save("blank.png")
    words = [*QUICK, "figure=[triptych]"]
    words += ["-m", "inputs.expression=generated:2,missing.jpg,blank.png,generated:3"]
    answer = lmexp(*words, "hardware.batch_size=4")
    assert answer.code == 1
    said = "".join(answer.out.split("│")).replace("\n", " ")
    assert "2 finished, 2 failed" in said
    jobs = read_index(lmexp.sweep_folder())["jobs"]
    assert [job["state"] for job in jobs] == ["finished", "failed", "failed", "finished"]
    assert "missing.jpg" in jobs[1]["reason"] and "no file" in jobs[1]["reason"]
    assert "face" in jobs[2]["reason"] and "blank.png" in jobs[2]["reason"]
    assert jobs[1]["folder"] is None
    status = RunFolder(lmexp.sweep_folder() / jobs[2]["folder"]).read_status()
    assert status is not None and status.state == "failed"
    assert (lmexp.sweep_folder() / "figures" / "triptych.png").exists()

    again = lmexp(*words)
    assert again.code == 1 and "2 skipped, 2 failed" in "".join(again.out.split("│"))


def test_a_fault_of_one_batch_leaves_the_other_batches_alone(lmexp: CommandLine) -> None:
    """LPIPS refuses 16 px only when it is bound: not the config's fault, but the batch's."""
    words = [word for word in QUICK if not word.startswith(("loss", "generator"))]
    answer = lmexp(*words, "loss=[lpips,landmarks]", "-m", "generator.resolution=16,32")
    assert answer.code == 1
    jobs = read_index(lmexp.sweep_folder())["jobs"]
    assert [job["state"] for job in jobs] == ["failed", "finished"]
    assert "too small" in jobs[0]["reason"]


def test_a_term_that_lacks_something_is_refused_before_anything_is_computed(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*(word for word in QUICK if not word.startswith("loss=")), "figure=[]"]

    def measure(*_: object) -> None:
        raise AssertionError("computed")

    with monkeypatch.context() as patch:
        patch.setattr("lmexp.workbench.measure", measure)
        for term, said in (
            ("smoothness", "loss.smoothness.previous: missing; give"),
            ("discriminator", "loss.discriminator: TinyRandom comes without a discriminator; give"),
        ):
            answer = lmexp(*words, f"loss=[landmarks,prior,noise,{term}]")
            assert answer.code == 1 and answer.out.startswith(f"Failed: {said}"), answer

    words += ["loss=[landmarks,prior,noise,smoothness]", "hardware.batch_size=2"]
    answer = lmexp(*words, "-m", "loss.smoothness.weight=0.1,0")
    assert answer.code == 1 and "together" not in answer.err and "jobs 1–2" not in answer.err
    jobs = read_index(lmexp.sweep_folder())["jobs"]
    assert [job["state"] for job in jobs] == ["failed", "finished"]
    assert jobs[0]["reason"].startswith("loss.smoothness.previous: missing; give")


def test_a_discriminator_is_read_once_a_sweep(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    make = StyleGAN2Random.discriminator
    monkeypatch.setattr(
        StyleGAN2Random, "discriminator", lambda self: (reads.append(self), make(self))[1]
    )
    words = ["experiment=debug", "generator=stylegan2_random", "generator.resolution=32"]
    words += ["generator.channel_max=8", "generator.latent_dim=16", "latent.start=mean"]
    words += ["loss=[landmarks,prior,noise,discriminator]", "figure=[]", "hardware.threads=1"]
    words += ["optimizer.steps=1", "recording.video_frames=0", "hardware.precision=bfloat16"]
    answer = lmexp(*words, "-m", "seed=1,2")  # two batches, of the generator's copy for the steps
    assert answer.code == 0 and len(reads) == 1, answer


def test_the_same_job_twice_runs_once(lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    original = Recorder.start

    def start(self: Recorder, **values: object) -> None:
        started.append(self.folder.path)
        original(self, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(Recorder, "start", start)
    answer = lmexp(*QUICK, "-m", "seed=1,1,2", "hardware.batch_size=3")
    assert answer.code == 0
    assert len(started) == len(set(started)) == 2
    jobs = read_index(lmexp.sweep_folder())["jobs"]
    assert jobs[0]["folder"] == jobs[1]["folder"] != jobs[2]["folder"]


def test_ctrl_c_in_a_sweep_and_on_with_the_same_command(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Recorder.record_step
    calls = 0

    def record_step(self: Recorder, now: int, **values: object) -> None:
        nonlocal calls
        original(self, now, **values)  # type: ignore[arg-type]
        calls += 1
        if calls == 7:  # in the second job
            signal.raise_signal(signal.SIGINT)

    words = [*QUICK, "+sweep=seeds"]
    monkeypatch.setattr(Recorder, "record_step", record_step)
    stopped = lmexp(*words)
    assert stopped.code == 130
    states = [job["state"] for job in read_index(lmexp.sweep_folder())["jobs"]]
    assert states == ["finished", "interrupted", "interrupted", "interrupted"]
    assert "un the same command again" in stopped.out

    monkeypatch.setattr(Recorder, "record_step", original)
    resumed = lmexp(*words)
    assert resumed.code == 0 and "from step 2" in resumed.err
    lmexp(*words, "output_dir=whole")
    (whole,) = Path("whole").glob("seeds-*")
    for job in read_index(lmexp.sweep_folder())["jobs"]:
        mine, other = latents(lmexp.sweep_folder() / job["folder"]), latents(whole / job["folder"])
        assert np.array_equal(mine, other)


def test_a_grid_of_two_factors_varies_both(lmexp: CommandLine) -> None:
    answer = lmexp(
        *QUICK,
        "-m",
        "loss.landmarks.weight=0.05,0.5",
        "latent.space=w,w_plus",
        "figure=[factor_grid]",
    )
    assert answer.code == 0
    jobs = read_index(lmexp.sweep_folder())["jobs"]
    assert len(jobs) == 4 and all(len(job["overrides"]) == 2 for job in jobs)
    assert (lmexp.sweep_folder() / "figures" / "factor_grid.png").exists()
    spread = [latents(lmexp.sweep_folder() / job["folder"])[0].std(0).max() for job in jobs]
    assert [bool(value < 1e-6) for value in spread] == [True, False, True, False]
