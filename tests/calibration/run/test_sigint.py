import signal

import pytest

from calibration.run.sigint import InterruptFlag


def test_the_first_ctrl_c_is_noted_and_the_second_acts():
    with InterruptFlag() as interrupt:
        assert not interrupt.seen
        signal.raise_signal(signal.SIGINT)
        assert interrupt.seen
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_afterwards_ctrl_c_is_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    with InterruptFlag():
        pass
    assert signal.getsignal(signal.SIGINT) is before
