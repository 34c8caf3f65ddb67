from prometheus_client.parser import text_string_to_metric_families

from edm_deploy.serving.histogram import BOUNDS, Counts
from edm_deploy.serving.interface import Stats
from edm_deploy_tools.serving.metrics import HttpCounts, exposition


def test_prometheus_reads_what_is_exposed():
    http = HttpCounts(["/health"])
    http.add("/health", 200)
    http.add("/anything", 404)
    http.add("/else", 404)
    http.add("/health", 0)
    counts = Counts((1, 2, *[0] * (len(BOUNDS) - 2), 3), 4.5)
    text = exposition({"a": Stats(slots=8, calls=10, rows=70, step_seconds=counts), "b": Stats(state="failed")}, http).decode()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["edm_engine_rows_total", "a"] == 70
    assert samples["edm_slots", "a"] == 8
    assert (samples["edm_ready", "a"], samples["edm_ready", "b"]) == (1, 0)
    assert samples["edm_step_seconds_bucket", "0.001", "a"] == 1
    assert samples["edm_step_seconds_bucket", "0.0025", "a"] == 3
    assert samples["edm_step_seconds_bucket", "+Inf", "a"] == samples["edm_step_seconds_count", "a"] == 6
    assert samples["edm_step_seconds_sum", "a"] == 4.5
    assert samples["edm_http_requests_total", "404", "other"] == 2
    assert samples["edm_http_requests_total", "/health", "499"] == 1
