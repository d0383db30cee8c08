from __future__ import annotations

import io

import pytest

from lmexp.recording.progress import ProgressBar, job_title


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, **options: object) -> str:
    with ProgressBar(20, stream=stream, **options) as bar:  # type: ignore[arg-type]
        for step in range(5, 20):
            bar.update(step, {"loss": 1 / (step + 1), "lpips": 0.25})
    return stream.getvalue()


def test_where_nobody_looks_there_is_one_line_at_each_end() -> None:
    first, last = run(io.StringIO(), title="job 2/6", first_step=5).splitlines()
    assert first == "job 2/6: 20 steps from step 5"
    assert last.startswith("job 2/6: 20/20 steps in ")
    assert last.endswith("loss 0.05  lpips 0.25")


def test_quiet_is_quiet() -> None:
    assert run(io.StringIO(), quiet=True) == ""
    assert run(Terminal(), quiet=True) == ""


def test_a_terminal_shows_steps_losses_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = run(Terminal(), title="job 2/6")
    for part in ("job 2/6", "20/20", "loss 0.05", "lpips 0.25", "left"):
        assert part in shown


def test_an_interrupted_bar_says_how_far_it_came() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), ProgressBar(20, stream=stream) as bar:
        bar.update(6, {"loss": 1.0})
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1].startswith("projection: 7/20 steps in ")


@pytest.mark.parametrize(
    ("arguments", "title"),
    [((1, 1, 1), ""), ((2, 1, 6), "job 2/6"), ((1, 4, 6), "jobs 1–4/6"), ((5, 2, 6), "jobs 5–6/6")],
)
def test_titles(arguments: tuple[int, int, int], title: str) -> None:
    assert job_title(*arguments) == title
