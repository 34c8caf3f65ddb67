import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engines.common.serialized_runs import SerializedRuns

CUDA = torch.device("cuda")


def test_a_run_waits_on_the_gpu_for_the_one_before_it_on_another_stream(streams):
    runs = SerializedRuns(CUDA)

    def enqueue(kernel):
        with runs.next() as stream:
            stream.enqueued.append(kernel)
        return stream

    first = enqueue("a")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(enqueue, "b").result()
    enqueue("c")
    assert first.enqueued == ["a", "record 1", "wait 2", "c", "record 3"]
    assert second.enqueued == ["wait 1", "b", "record 2"]


def test_two_threads_are_never_inside_at_once(streams):
    runs, inside, most = SerializedRuns(CUDA), [], []

    def enter():
        for _ in range(20):
            with runs.next():
                inside.append(threading.get_ident())
                time.sleep(0.001)
                most.append(len(inside))
                inside.pop()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(enter) for _ in range(2)]:
            done.result()
    assert set(most) == {1}


def test_after_a_run_that_failed_the_next_still_waits_for_what_it_enqueued(streams):
    runs = SerializedRuns(CUDA)
    with pytest.raises(ZeroDivisionError), runs.next():
        raise ZeroDivisionError
    with runs.next() as stream:
        pass
    assert stream.enqueued == ["record 1", "wait 1", "record 2"]


def test_finish_waits_for_the_latest_run_and_for_nothing_where_there_was_none(streams):
    runs = SerializedRuns(CUDA)
    runs.finish()
    assert streams == {}
    with runs.next() as stream:
        pass
    runs.finish()
    assert stream.enqueued == ["record 1", "synchronize 1"]
