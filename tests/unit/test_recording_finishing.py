"""Results that are written side by side: in order, and all of them whatever fails."""

from __future__ import annotations

import threading

import pytest

from lmexp.errors import LmexpError
from lmexp.recording import finishing as finishing_module
from lmexp.recording.atomic_file import DiskFullError
from lmexp.recording.finishing import Finishing


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing_module.os, "cpu_count", lambda: 2)


def test_results_are_written_at_a_time_and_told_in_order() -> None:
    told: list[tuple[int, bool]] = []
    both, main = threading.Barrier(2, timeout=30), threading.current_thread()
    with Finishing() as finishing:
        for number in range(2):
            finishing.add(
                lambda: both.wait() and None,
                lambda number=number: told.append((number, threading.current_thread() is main)),
            )
    assert told == [(0, True), (1, True)]


def test_no_more_wait_than_are_written_soon() -> None:
    """Each holds its job's image and noise."""
    told: list[int] = []
    with Finishing() as finishing:
        for number in range(9):
            finishing.add(lambda: None, lambda number=number: told.append(number))
            assert len(told) == max(0, number + 1 - 4)
    assert told == list(range(9))


class FaultError(Exception):
    pass


def fail(with_what: Exception) -> None:
    raise with_what


@pytest.mark.parametrize(
    ("faults", "outside", "raised"),
    [
        ([None, LmexpError("first"), None, LmexpError("second")], None, "first"),
        ([LmexpError("first"), None, DiskFullError("full")], None, "full"),
        ([None, LmexpError("first")], FaultError("outside"), "outside"),
        ([DiskFullError("full"), None], FaultError("outside"), "full"),
        ([None, None], FaultError("outside"), "outside"),
    ],
)
def test_what_can_be_written_is_and_the_gravest_fault_is_told(
    faults: list[Exception | None], outside: Exception | None, raised: str
) -> None:
    told: list[int] = []
    with pytest.raises(Exception, match=raised), Finishing() as finishing:
        for number, fault in enumerate(faults):
            write = (lambda: None) if fault is None else (lambda fault=fault: fail(fault))
            finishing.add(write, lambda number=number: told.append(number))
        if outside is not None:
            raise outside
    assert told == [number for number, fault in enumerate(faults) if fault is None]
