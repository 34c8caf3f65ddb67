"""Prometheus metrics of the served models and of HTTP answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from edm_deploy.serving.histogram import BOUNDS, Counts
from edm_deploy.serving.interface import Stats

GAUGES = {
    "slots": ("edm_slots", "Rows of each call of the engine."),
    "occupied": ("edm_slots_occupied", "Rows of the latest call that samples used."),
    "requests": ("edm_requests_in_queue", "Accepted requests that have not ended."),
    "waiting": ("edm_images_waiting", "Images that have not been started."),
    "running": ("edm_images_running", "Images that have been started and not finished."),
    "memory": ("edm_request_memory_bytes", "Bytes that the accepted requests hold at most."),
}
COUNTERS = {
    "calls": ("edm_engine_calls", "Calls of the engine."),
    "rows": ("edm_engine_rows", "Rows of all calls that samples used; divided by calls times slots, the occupancy."),
    "images": ("edm_images", "Images that were finished."),
}
HISTOGRAMS = {
    "step_seconds": ("edm_step_seconds", "Time of a tick: a call of the engine and what the loop does around it."),
    "engine_seconds": ("edm_engine_seconds", "Time of a call of the engine."),
    "queue_seconds": ("edm_queue_seconds", "Time from a request's acceptance to its first call."),
    "request_seconds": ("edm_request_seconds", "Time from a request's acceptance to its last image."),
}


class HttpCounts:
    """Counts answers by path and status; paths that the application does not have are one."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = frozenset(paths)
        self._counts: Counter[tuple[str, int]] = Counter()

    def add(self, path: str, status: int) -> None:
        """Count an answer; status 0 is a client that went before there was one, 499."""
        self._counts[path if path in self._paths else "other", status or 499] += 1

    def family(self) -> Metric:
        """As a metric."""
        family = CounterMetricFamily(
            "edm_http_requests", "Answers by path and status; 499 is a client that went.", labels=["path", "status"]
        )
        for (path, status), count in sorted(self._counts.items()):
            family.add_metric([path, str(status)], count)
        return family


class _Families:
    """A collector of metrics that have been made."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """The metrics."""
        return self._families


def exposition(stats: Mapping[str, Stats], http: HttpCounts) -> bytes:
    """All metrics in Prometheus' text format, those of models labelled with their names."""
    families: list[Metric] = [http.family()]
    for field, (name, words) in GAUGES.items():
        gauge = GaugeMetricFamily(name, words, labels=["model"])
        for model, each in stats.items():
            gauge.add_metric([model], getattr(each, field))
        families.append(gauge)
    for field, (name, words) in COUNTERS.items():
        counter = CounterMetricFamily(name, words, labels=["model"])
        for model, each in stats.items():
            counter.add_metric([model], getattr(each, field))
        families.append(counter)
    ended = CounterMetricFamily("edm_requests", "Requests that have ended, by how.", labels=["model", "result"])
    ready = GaugeMetricFamily("edm_ready", "1 where the model takes requests.", labels=["model"])
    for model, each in stats.items():
        ready.add_metric([model], float(each.state == "ready"))
        for result in ("finished", "cancelled", "failed"):
            ended.add_metric([model, result], getattr(each, result))
    families += [ended, ready]
    for field, (name, words) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, words, labels=["model"])
        for model, each in stats.items():
            counts: Counts = getattr(each, field)
            histogram.add_metric([model], _cumulative(counts), counts.total)
        families.append(histogram)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))  # type: ignore[arg-type]  # a Collector by its method
    return generate_latest(registry)


def _cumulative(counts: Counts) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, count in zip([*map(str, BOUNDS), "+Inf"], counts.buckets, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
