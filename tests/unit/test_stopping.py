from __future__ import annotations

import signal
import threading

import pytest

from lmexp.stopping import StopRequest, listen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_and_a_second_one_an_interrupt(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with listen() as request:
        assert not request.requested
        signal.raise_signal(number)
        assert request.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), listen():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_works_without_signals_in_another_thread() -> None:
    seen: list[StopRequest] = []

    def work() -> None:
        with listen() as request:
            request.ask()
            seen.append(request)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0].requested
