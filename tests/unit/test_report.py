from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmexp.jobs import Outcome, Request
from lmexp.landmarks.groups import GROUPS
from lmexp.report import exit_code, print_outcomes

CONFIG: Any = None  # a report reads the overrides only


def outcome(state: Any, *overrides: str, **values: Any) -> Outcome:
    return Outcome(Request(CONFIG, overrides), state, **values)


def summary(**errors: float | None) -> dict[str, Any]:
    nme = {**dict.fromkeys(GROUPS, 2.0), "all": 3.0, **errors}
    return {"label": "ann+bo", "nme": nme, "nme_judge_independent": True}


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["finished", "skipped"], 0),
        (["finished", "failed"], 1),
        (["failed", "interrupted", "finished"], 130),
    ],
)
def test_exit_codes(states: list[str], code: int) -> None:
    assert exit_code([outcome(state) for state in states]) == code


def test_a_finished_run_says_what_it_is_and_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("proj.png", "proj.mp4"):
        (tmp_path / name).touch()
    # The mouth: (12 · 4 + 8 · 6) / 20 = 4.8
    numbers = summary(outer_lip=4.0, inner_lip=6.0)
    print_outcomes([outcome("finished", folder=tmp_path, summary=numbers)])
    out = capsys.readouterr().out
    assert "ann with the expression of bo" in out
    assert "3.00 %" in out and "4.80 % at the mouth" in out
    assert f"picture     {tmp_path / 'proj.png'}" in out and "video" in out
    assert "figures" not in out  # none were made
    assert "before" not in out


def test_a_skipped_run_says_how_to_repeat_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = summary(all=None) | {"nme_judge_independent": False}
    print_outcomes([outcome("skipped", folder=tmp_path, summary=numbers)])
    out = capsys.readouterr().out
    assert "finished before" in out and f"delete {tmp_path}" in out
    assert "nan %" in out and "landmarks@judge=" in out


def test_a_failed_and_a_stopped_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_outcomes([outcome("failed", folder=tmp_path, reason="no face in a.jpg")])
    assert capsys.readouterr().out == (
        f"Failed: no face in a.jpg\nWhat was saved is in {tmp_path}\n"
    )
    print_outcomes([outcome("failed", folder=tmp_path / "none", reason="no face")])
    assert capsys.readouterr().out == "Failed: no face\n"
    print_outcomes([outcome("interrupted", folder=tmp_path, reason="stopped after step 3")])
    assert capsys.readouterr().out == (
        "Stopped after step 3.\nTo go on, run the same command again.\n"
    )


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_no_word_of_a_sweep_is_broken_however_narrow_the_terminal(
    columns: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    weights = ("loss.lpips.weight=32", "loss.landmarks.weight=0.1", "loss.prior.weight=0.3")
    folder = tmp_path / "generated1+generated2-1fe150a17e75"
    reason = "inputs.look: no file 'nobody.jpg' (looked from here); give one that there is"
    outcomes = [
        outcome("finished", *weights, folder=folder, summary=summary()),
        outcome("failed", "inputs.look=nobody.jpg", reason=reason),
    ]
    print_outcomes(outcomes, tmp_path)
    out = capsys.readouterr().out
    words = [*weights, *reason.split(" "), folder.name, "inputs.look=nobody.jpg", "finished"]
    for word in (*words, "2.00 %", "3.00 %", "mouth", "failed:"):
        assert word in out, word
    lines = out.split("Everything is in")[0].splitlines()
    assert all(len(line) <= columns for line in lines)
    assert ("│" in out) == (columns > 80)


def test_a_sweep_is_a_table_with_every_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "triptych.png").touch()
    outcomes = [
        outcome("finished", "loss=[lpips]", folder=tmp_path / "one", summary=summary()),
        outcome("failed", "loss=[prior]", reason="no file [x].jpg"),
    ]
    print_outcomes(outcomes, tmp_path)
    out = capsys.readouterr().out
    assert "2 jobs" in out and "1 finished, 1 failed" in out
    assert "loss=[lpips]" in out and "loss=[prior]" in out  # no markup
    assert "failed: no file [x].jpg" in out
    assert "2.00 %" in out and "3.00 %" in out
    assert "Run the same command again" in out and str(tmp_path / "figures") in out
