import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import engines
from edm_deploy import registry
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.runtime.backend import BuildOptions, Session


def test_an_unsupported_option_is_refused_with_the_supported_ones():
    backend = registry.load(engines, "ort", "BACKEND")
    with pytest.raises(UnsupportedError, match=r"ort has no option --gpu\. Leave it out; its options: .*--threads"):
        backend.refuse_foreign_options(BuildOptions(gpu="rtx3090"))


def test_the_default_options_suit_every_backend():
    for name in registry.names(engines):
        registry.load(engines, name, "BACKEND").refuse_foreign_options(BuildOptions())


class Doubling(Session):
    """Doubles its input, as slowly as the test lets it."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.started, self.proceed, self.released = threading.Event(), threading.Event(), 0

    def _infer(self, inputs):
        self.started.set()
        assert self.proceed.wait(60)
        assert self.released == 0
        return {name: 2 * value for name, value in inputs.items()}

    def _release(self):
        self.released += 1


def test_closing_waits_for_running_calls_refuses_later_ones_and_releases_once():
    session, x = Doubling(), {"x": torch.ones(1)}
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(session.run, x)
        assert session.started.wait(60)
        closing = pool.submit(session.close)
        while not session._closed:
            time.sleep(0.001)
        with pytest.raises(InputError, match=r"has been closed\. Open it again with load_denoiser or open_session"):
            session.run(x)
        assert session.released == 0
        session.proceed.set()
        assert torch.equal(running.result()["x"], torch.full((1,), 2.0))
        closing.result()
    session.close()
    assert session.released == 1


def test_a_session_closes_when_its_context_ends_even_by_an_error():
    with pytest.raises(ZeroDivisionError), Doubling() as session:
        raise ZeroDivisionError
    assert session.released == 1


def test_a_call_that_fails_does_not_keep_the_session_open():
    class Failing(Doubling):
        def _infer(self, inputs):
            raise RuntimeError

    session = Failing()
    with pytest.raises(RuntimeError):
        session.run({})
    session.close()
    assert session.released == 1
