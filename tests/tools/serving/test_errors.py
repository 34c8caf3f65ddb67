import json

import pytest

from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.serving.interface import BusyError, EngineError, UnavailableError
from edm_deploy_tools.serving.errors import HttpError, http_error

ANSWERS = [
    (InputError("steps is 0, expected more."), 400, "invalid_request_error", "steps"),
    (InputError("height 9: expected a multiple of 8."), 400, "invalid_request_error", "size"),
    (InputError("The prompt 'a...' has 99 tokens."), 400, "invalid_request_error", "prompt"),
    (UnsupportedError("No scheduler 'x'."), 400, "invalid_request_error", None),
    (BusyError("full", 2.4), 429, "rate_limit_error", None),
    (UnavailableError("gone"), 503, "server_error", None),
    (EngineError("broken"), 500, "server_error", None),
    (ArtifactError("broken"), 500, "server_error", None),
    (HttpError(404, "two\nlines", param="model"), 404, "invalid_request_error", "model"),
]


@pytest.mark.parametrize(("err", "status", "kind", "param"), ANSWERS, ids=lambda value: type(value).__name__)
def test_each_error_has_a_status_and_openais_shape(err, status, kind, param):
    response = http_error(err).response
    assert response.status_code == status
    error = json.loads(response.body)["error"]
    assert (error["type"], error["param"]) == (kind, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]


def test_a_full_queue_has_the_seconds_until_another_try():
    assert http_error(BusyError("full", 2.4)).response.headers["retry-after"] == "3"


def test_a_fault_of_ours_tells_the_caller_no_details():
    assert "secret" not in http_error(RuntimeError("secret")).message
    assert http_error(RuntimeError("secret")).status == 500
