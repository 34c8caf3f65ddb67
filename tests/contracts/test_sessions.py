"""An opened engine under several threads, changing shapes and `close`, on every backend that runs on this machine."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import engines
from edm_deploy.errors import InputError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.load import load_denoiser
from tests.conftest import tiny_inputs
from tests.contracts.test_backends import RUNS_HERE

OPTIONS = {name: BuildOptions(threads=1) for name in ("ort", "openvino", "cpu")} | {"cuda": BuildOptions(gpu="rtx3090")}
CALLS = 15  # of each thread


@pytest.fixture(scope="module", params=RUNS_HERE)
def engine(request, onnx_w4a4, artifact_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    source = onnx_w4a4
    if engines.backend_named(request.param).builds_from == "artifact":
        source = path / "artifact"
        artifact_w4a4.save(source)
    engines.build_engine(source, path / "engine", backend=request.param, options=OPTIONS[request.param])
    return path / "engine"


@pytest.fixture(scope="module")
def denoiser(engine):
    with load_denoiser(engine, device="cpu") as opened:
        yield opened


def calls(batches: list[int], seed: int) -> list[dict[str, torch.Tensor]]:
    """Inputs of CALLS calls, of these batch sizes in turn, each sample at a random timestep."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tiny_inputs("unet2d", batch, seed=CALLS * seed + number)
        | {"timestep": torch.randint(0, 1000, (batch,), generator=generator).float()}
        for number, batch in enumerate((batches * CALLS)[:CALLS])
    ]


@pytest.mark.parametrize("batches", [([2], [2]), ([2], [3, 1])], ids=["equal shapes", "different shapes"])
def test_calls_from_two_threads_give_what_each_call_gives_alone(denoiser, batches):
    work = [calls(each, seed) for seed, each in enumerate(batches)]
    alone = [[denoiser(**inputs).sample for inputs in each] for each in work]
    start = threading.Barrier(len(work))

    def hammer(each):
        start.wait()
        return [denoiser(**inputs).sample for inputs in each]

    with ThreadPoolExecutor(len(work)) as pool:
        together = list(pool.map(hammer, work))
    # The same kernels on the same shapes: every bit, so that a look-up or a buffer of the other call would show.
    assert [[torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(alone, together, strict=True)] == [[True] * CALLS] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_predicted_as_nan_and_its_neighbour_as_without_it(denoiser, bad):
    inputs = tiny_inputs("unet2d", 2)
    expected = denoiser(**inputs).sample
    inputs["sample"][0, 1, 2, 3] = bad
    found = denoiser(**inputs).sample
    assert bool(found[0].isnan().all())
    assert torch.equal(found[1], expected[1])


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_shapes_that_change_at_every_call_do_not_grow_memory(denoiser):
    if denoiser.manifest.backend == "openvino":
        pytest.skip("compiles for seconds at each shape; tests/engines/test_openvino.py has the same on a small graph")

    def run(batches):
        for batch in batches:
            denoiser(torch.randn(batch, 3, 8, 8), 500)
        gc.collect()
        return resident_mib()

    before = run([30, 1])
    # The largest shape came first. One float32 [30, 32, 8, 8] map is 0.25 MiB: sixty retained sets of activations would be over 100 MiB.
    assert run([number * 7 % 30 + 1 for number in range(60)]) < before + 40


def test_a_closed_engine_refuses_to_run_and_closes_again(engine):
    inputs = tiny_inputs("unet2d", 1)
    with load_denoiser(engine, device="cpu") as denoiser:
        kept = denoiser(**inputs).sample
        copy = kept.clone()
    with pytest.raises(InputError, match=r"This engine has been closed\. Open it again with load_denoiser"):
        denoiser(**inputs)
    denoiser.close()
    assert torch.equal(kept, copy), "results outlive their engine"
