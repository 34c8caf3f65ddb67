import signal
import subprocess
import sys
import threading

import pytest

from calibration.run.interrupt_flag import InterruptFlag


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_recorded_and_the_second_has_its_previous_effect(number):
    def previous(number, frame):
        raise RuntimeError("previous handler")

    before = signal.signal(number, previous)
    try:
        with InterruptFlag() as interrupt:
            assert not interrupt.is_set
            signal.raise_signal(number)
            assert interrupt.is_set
            with pytest.raises(RuntimeError, match="previous handler"):
                signal.raise_signal(number)
        assert signal.getsignal(number) is previous
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_interrupts_and_a_second_sigterm_ends_the_process():
    code = """
import signal, sys
from calibration.run.interrupt_flag import InterruptFlag
signal.signal(signal.SIGINT, signal.default_int_handler)
with InterruptFlag():
    signal.raise_signal(signal.SIGTERM)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    signal.raise_signal(signal.SIGTERM)
print("not reached")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == ("interrupted\n", -signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_the_parent_ignores_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with InterruptFlag() as interrupt:
            signal.raise_signal(number)
            assert not interrupt.is_set
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_handlers_are_restored_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with InterruptFlag():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_another_thread_than_the_main_one_changes_no_handler():
    before, inside = signal.getsignal(signal.SIGINT), []

    def work():
        with InterruptFlag():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]
