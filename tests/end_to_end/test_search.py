"""Searching by Optuna through the command line: proposals as batches, resumed, refused."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from test_faults import SMALL

from lmexp.recording.recorder import Recorder
from lmexp.recording.run_folder import RunFolder

SEARCH = (*SMALL, "-m", "hydra/sweeper=search", "hydra.sweeper.at_once=2", "hardware.batch_size=2")
RANGE = "loss.prior.weight=tag(log,interval(0.01,1))"
needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="optuna is not installed (extra: search)"
)


def read_search() -> dict[str, Any]:
    (path,) = Path("runs").glob("search-*/search.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@needs_optuna
def test_a_search_tells_what_was_best_and_goes_on_where_it_was(lmexp: CommandLine) -> None:
    words = [*SEARCH, RANGE, "latent.space=w,w_plus", "seed=range(0,9,3)"]
    first = lmexp(*words, "hydra.sweeper.trials=2")
    assert first.code == 0, first
    more = lmexp(*words, "hydra.sweeper.trials=5")
    assert more.code == 0, more
    found = read_search()
    trials = found["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 5
    for trial in trials:
        assert 0.01 <= trial["params"]["loss.prior.weight"] <= 1
        assert trial["params"]["latent.space"] in ("w", "w_plus")
        assert trial["params"]["seed"] in (0, 3, 6)
        folder = RunFolder(next(Path("runs").glob(f"search-*/{trial['folder']}")))
        assert trial["values"] == [folder.read_summary()["nme"]["all"]]
        config = folder.read_config()
        assert config["loss"]["prior"]["weight"] == trial["params"]["loss.prior.weight"]
    # Drawn on, not drawn again: a resumed search has other proposals than its first ones.
    assert len({trial["params"]["loss.prior.weight"] for trial in trials}) == 5
    # Two trials of one seed and space may come to the same.
    best = min(trials, key=lambda trial: trial["values"][0])
    assert all(trial["best"] == (trial["values"] == best["values"]) for trial in trials)
    assert f"best: nme.all {best['values'][0]:.4g}" in more.out and best["folder"] in more.out

    again = lmexp(*words, "hydra.sweeper.trials=5")
    assert again.code == 0 and "5 trials scored" in again.out and "steps" not in again.err


@needs_optuna
def test_a_stopped_search_finishes_what_it_had_proposed(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Recorder.record_step
    calls = 0

    def record_step(self: Recorder, now: int, **values: object) -> None:
        nonlocal calls
        original(self, now, **values)  # type: ignore[arg-type]
        calls += 1
        if calls == 13:  # two jobs of five steps are done; the next two are on their way
            signal.raise_signal(signal.SIGINT)

    words = [
        *SEARCH,
        RANGE,
        "hydra.sweeper.trials=4",
        "hydra.sweeper.objective=[nme.all,losses.total]",
        "hydra.sweeper.direction=[minimize,minimize]",
    ]
    monkeypatch.setattr(Recorder, "record_step", record_step)
    assert lmexp(*words).code == 130
    proposed = {t["params"]["loss.prior.weight"] for t in read_search()["trials"]}
    assert [t["state"] for t in read_search()["trials"]] == ["complete"] * 2 + ["running"] * 2
    monkeypatch.setattr(Recorder, "record_step", original)
    answer = lmexp(*words)
    assert answer.code == 0 and "from step 2" in answer.err
    complete = [t for t in read_search()["trials"] if t["state"] == "complete"]
    assert {t["params"]["loss.prior.weight"] for t in complete} == proposed
    assert len(complete) == 4 and any(t["best"] for t in complete)


@needs_optuna
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "nothing to search"),
        ([RANGE, "hydra.sweeper.direction=[minimize,maximize]"], "2 for 1 objectives"),
        ([RANGE, "hydra.sweeper.trials=0"], "hydra.sweeper.trials"),
        ([RANGE, "hydra.sweeper.sampler=grid"], "hydra.sweeper.sampler"),
        (["loss.prior.weight=interval(2,1)"], "loss.prior.weight"),
        (["optimizer.beta1=interval(1.5,2)"], "optimizer.beta1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    lmexp: CommandLine, words: list[str], said: str
) -> None:
    answer = lmexp(*SEARCH, *words)
    assert answer.code == 2 and said in answer.err, answer
    assert len(answer.err.strip().splitlines()) == 1 and not list(Path().glob("runs/*/*"))


@needs_optuna
def test_a_score_that_is_not_there_is_said(lmexp: CommandLine) -> None:
    words = [*SEARCH, RANGE, "hydra.sweeper.trials=9", "hydra.sweeper.at_once=1"]
    answer = lmexp(*words, "hydra.sweeper.objective=[nme.outer_lib]")
    assert answer.code == 2 and "no run has nme.outer_lib" in answer.err
    assert "did you mean nme.outer_lip" in answer.err
    assert len(list(Path().glob("runs/*/*/summary.json"))) == 1  # and not nine


def test_without_optuna_one_line_says_what_to_install(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    answer = lmexp(*SEARCH, RANGE)
    assert answer.code == 2 and "pip install 'lmexp[search]'" in answer.err
