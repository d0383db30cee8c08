"""The same sweep on Ray and by submitit: here a Ray cluster of several nodes on one host, and
submitit's local executor. Skipped where these optional packages are not installed."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import CommandLine, environment, latents, read_index
from test_faults import SMALL, deadly, states

from lmexp.recording.run_folder import RunFolder

HERE = Path(__file__).parent


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (extra: cluster)")


def set_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes import: lmexp, and the faulty parts."""
    monkeypatch.setenv("PYTHONPATH", f"{environment()['PYTHONPATH']}:{HERE}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def assert_same_as_alone(lmexp: CommandLine, *words: str) -> None:
    assert lmexp(*words, "output_dir=alone").code == 0
    (alone,) = Path("alone").glob("*/index.json")
    jobs = read_index(lmexp.sweep_folder())["jobs"]
    for job, twin in zip(jobs, read_index(alone.parent)["jobs"], strict=True):
        assert np.array_equal(
            latents(lmexp.sweep_folder() / job["folder"]), latents(alone.parent / twin["folder"])
        )


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """A Ray cluster: a head that computes nothing, and two nodes of one core each."""
    import ray
    from ray.cluster_utils import Cluster

    set_paths(monkeypatch)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    try:
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


@needs("ray")
def test_ray_survives_the_loss_of_a_node(
    lmexp: CommandLine, two_nodes: tuple[Any, list[Any]]
) -> None:
    cluster, nodes = two_nodes
    words = [*SMALL, "optimizer.steps=120", "-m", "seed=1,2,3,4"]
    lost: list[int] = []

    def lose_a_node() -> None:
        """Kill a node as soon as two jobs are on their way."""
        for _ in range(2400):
            saved = list(Path("runs").glob("*/*/state.safetensors"))
            if len(saved) >= 2:
                cluster.remove_node(nodes[0], allow_graceful=False)
                lost.append(len(saved))
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=lose_a_node)
    watcher.start()
    engine = f"hydra.launcher.engine.address='{cluster.address}'"
    answer = lmexp(*words, "hydra/launcher=ray", engine)
    watcher.join()
    assert lost, "no node was lost"
    assert answer.code == 0, answer
    assert states(lmexp) == ["finished"] * 4
    pids = {
        status.pid
        for job in read_index(lmexp.sweep_folder())["jobs"]
        if (status := RunFolder(lmexp.sweep_folder() / job["folder"]).read_status())
    }
    assert pids, "nobody computed"
    assert_same_as_alone(lmexp, *words)


@needs("ray")
def test_ray_without_room_says_so(lmexp: CommandLine, two_nodes: tuple[Any, list[Any]]) -> None:
    cluster, _ = two_nodes
    answer = lmexp(
        *SMALL,
        "-m",
        "seed=1,2",
        "hydra/launcher=ray",
        f"hydra.launcher.engine.address='{cluster.address}'",
        "hydra.launcher.engine.gpus_per_batch=1",
    )
    assert answer.code == 2 and "no node of the cluster has 1 CPUs and 1 GPUs" in answer.err


@pytest.mark.slow
@needs("submitit")
def test_submitit_runs_a_sweep_and_a_killed_job_goes_on(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_paths(monkeypatch)
    words = [*SMALL, "-m", "seed=1,2"]
    terms = [deadly("once", seed=1), deadly("always", seed=2, times=9)]
    local = ["hydra/launcher=submitit", "hydra.launcher.engine.cluster=local"]
    answer = lmexp(*words, *terms, *local, "hydra.launcher.engine.parallel=2")
    assert answer.code == 1, answer
    assert states(lmexp) == ["finished", "failed"]
    assert "died 2 times" in read_index(lmexp.sweep_folder())["jobs"][1]["reason"]


@needs("submitit")
def test_slurm_is_asked_for_what_the_config_says(tmp_path: Path) -> None:
    """The batch script that submitit would submit; there is no Slurm here."""
    from submitit.slurm.slurm import _make_sbatch_string

    from lmexp.launching.submitit_engine import SubmititEngine

    engine = SubmititEngine(
        cluster="slurm",
        parallel=8,
        retries=1,
        timeout_minutes=90,
        cpus_per_batch=4,
        gpus_per_batch=1,
        memory_gb=24,
        parameters={"slurm_partition": "gpu"},
    )
    from submitit.slurm.slurm import SlurmExecutor

    asked = dict(engine._parameters)
    partition = {k.removeprefix("slurm_"): asked.pop(k) for k in ["slurm_partition"]}
    converted = object.__new__(SlurmExecutor)._convert_parameters(asked) | partition
    script = _make_sbatch_string(command="x", folder=tmp_path, **converted)
    for line in ("--time=90", "--cpus-per-task=4", "--gpus-per-node=1", "--partition=gpu"):
        assert f"#SBATCH {line}" in script
    assert "24" in next(line for line in script.splitlines() if "--mem" in line)


@pytest.mark.parametrize("name", ["ray", "submitit"])
def test_a_missing_package_is_one_line(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    answer = lmexp(*SMALL, "-m", "seed=1,2", f"hydra/launcher={name}")
    assert answer.code == 2
    assert f"hydra/launcher={name}: the package {name} is not installed" in answer.err
    assert "pip install 'lmexp[cluster]'" in answer.err


def test_a_wrong_key_of_an_engine_is_one_line(lmexp: CommandLine) -> None:
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed (extra: cluster)")
    words = [*SMALL, "-m", "seed=1,2", "hydra/launcher=submitit"]
    answer = lmexp(*words, "hydra.launcher.engine.parallel=0")
    assert answer.code == 2 and "parallel" in answer.err and "Traceback" not in answer.err
