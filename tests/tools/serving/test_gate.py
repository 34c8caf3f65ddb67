import contextlib
import io
import json

import pytest

from edm_deploy.errors import InputError
from edm_deploy_tools.serving.gate import RequestLog, read_keys
from tests.tools.serving.http_client import serving


def test_keys_are_lines_of_a_file_and_the_variable(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("# ours\none\n\n  two \n")
    assert read_keys(tmp_path / "keys", "three, ,four") == {"one", "two", "three", "four"}
    assert read_keys(None, "") == frozenset()
    monkeypatch.setenv("EDM_DEPLOY_API_KEYS", "five")
    assert read_keys(None) == {"five"}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read: No such file"), (b"\xff\xfe", "it is no text"), (b"# no key\n", "has no keys")]
)
def test_a_file_without_keys_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_keys(tmp_path / "keys", "")


def test_where_there_are_keys_the_api_needs_one(replica):
    log = io.StringIO()
    with serving({"tiny": replica}, keys=frozenset({"one", "two"}), log=RequestLog(log)) as client:
        for headers, message in (
            ({}, "No API key was sent"),
            ({"Authorization": "Bearer three"}, "Incorrect API key"),
            ({"Authorization": "Basic one"}, "Incorrect API key"),
        ):
            refused = client.send("GET", "/v1/models", headers=headers)
            assert refused.status == 401
            assert message in refused.error["message"]
            assert refused.error["code"] == "invalid_api_key"
        assert client.send("GET", "/v1/models", headers={"Authorization": "Bearer two"}).status == 200
        for path in ("/", "/health", "/metrics"):
            assert client.get(path).status == 200
    assert "three" not in log.getvalue() and "two" not in log.getvalue()


def test_each_request_is_one_line_of_json_in_the_log(replica):
    log = io.StringIO()
    with serving({"tiny": replica}, log=RequestLog(log)) as client:
        answered = client.generate(seed=3, steps=2, user="me")
        client.generate(steps="x")
        client.get("/nothing")
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 400, 404]
    assert lines[0]["request_id"] == answered.headers["x-request-id"]
    assert (lines[0]["model"], lines[0]["steps"], lines[0]["seed"], lines[0]["user"]) == ("tiny", 2, 3, "me")
    assert lines[0]["seconds"] > 0
    assert "steps is" in lines[1]["error"]
    assert len({line["request_id"] for line in lines}) == 3


def test_a_log_that_cannot_be_written_ends_no_request(replica):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    with serving({"tiny": replica}, log=RequestLog(Full())) as client:
        assert client.get("/health").status == 200


def test_a_body_that_is_too_large_is_refused(replica):
    with serving({"tiny": replica}, largest_body=1000) as client:
        announced = client.generate(prompt="a" * 2000)
        assert announced.status == 413 and "expected at most 1000" in announced.error["message"]
        with contextlib.closing(client.connection()) as connection:
            connection.request(
                "POST", "/v1/images/generations", iter([b"a" * 600] * 4), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
            )
            assert connection.getresponse().status == 413
        assert client.generate(steps=1).status == 200


def test_a_fault_of_ours_is_a_500_with_its_traceback_in_the_log(replica, monkeypatch):
    log = io.StringIO()

    async def broken():
        raise RuntimeError("secret")

    monkeypatch.setattr(replica, "stats", broken)
    with serving({"tiny": replica}, log=RequestLog(log)) as client:
        answer = client.get("/health")
        assert answer.status == 500
        assert "secret" not in answer.error["message"]
    assert "RuntimeError: secret" in json.loads(log.getvalue())["error"]
