import pickle

import numpy as np

from edm_deploy.serving.interface import Accepted, BusyError, EngineError, Finished, ImageRequest, Stats, UnavailableError


def test_requests_events_and_errors_can_be_pickled():
    """A replica may be in another process."""
    request = ImageRequest(id="a", picture=np.zeros((2, 2, 3), np.uint8))
    assert pickle.loads(pickle.dumps(request)).picture.shape == (2, 2, 3)
    assert pickle.loads(pickle.dumps(Accepted(ahead=1, memory=2))) == Accepted(ahead=1, memory=2)
    assert pickle.loads(pickle.dumps(Finished(image=0, seed=1, pixels=np.ones((1, 1, 1), np.uint8)))).seed == 1
    assert pickle.loads(pickle.dumps(Stats(calls=3))) == Stats(calls=3)
    busy = pickle.loads(pickle.dumps(BusyError("full", 2.5)))
    assert (str(busy), busy.retry_after) == ("full", 2.5)
    for error in (UnavailableError("gone"), EngineError("broken")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
