"""Expected times of a model's sites on a GPU, in INT4 and in INT8, for a budget of time."""

from __future__ import annotations

from calibration.base_pass import SitePrice
from edm_deploy.network.layer_costs import ModelWork
from engines.performance.gpus import gpu_named
from engines.performance.roofline import Matmul, expected


def site_prices(work: ModelWork, gpu: str, batch: int) -> dict[str, SitePrice]:
    """Expected seconds of every site with our kernels; of sites that read one tensor the first quantizes it. Not measured.

    Args:
        work: Work of the model.
        gpu: Name of the GPU, as `engines/profiles/gpus.toml` has it. On one without INT4 both times are those of INT8.
        batch: Samples per call.

    Raises:
        UnsupportedError: There are no figures for the GPU.
    """
    device = gpu_named(gpu)

    def price(name: str) -> SitePrice:
        matmul, first = Matmul.of(work.sites[name], batch), work.shared_input[name] == name
        int4, int8 = (expected(matmul, precision, device, quantize=first).seconds for precision in ("int4", "int8"))
        return SitePrice(int4=int4, int8=int8)

    return {name: price(name) for name in work.sites}
