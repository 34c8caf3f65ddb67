import pytest

from edm_deploy.errors import UnsupportedError
from engines.performance.gpus import capabilities, capability, gpu_named, gpu_names, launch_seconds


@pytest.mark.parametrize("name", ["rtx3090", "RTX 3090", "NVIDIA GeForce RTX 3090", "rtx-3090", "sm_86", "sm86", "SM_86", "8.6"])
def test_a_gpu_is_known_by_every_way_to_write_it(name):
    assert capability(name) == "sm_86"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtx3080", "sm_86"),
        ("rtx4090", "sm_89"),
        ("a10", "sm_86"),
        ("a100", "sm_80"),
        ("H200", "sm_90"),
        ("rtx5090", "sm_120"),
        ("10.0", "sm_100"),
    ],
)
def test_compute_capabilities_are_nvidias(name, expected):
    assert capability(name) == expected


@pytest.mark.parametrize(
    ("by_the_driver", "figures", "sm"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100", "sm_80"),
        ("NVIDIA A100 80GB PCIe", "a100", "sm_80"),
        ("NVIDIA H100 80GB HBM3", "h100", "sm_90"),
        ("NVIDIA H100 PCIe", "h100pcie", "sm_90"),
        ("NVIDIA H200", "h200", "sm_90"),
        ("NVIDIA L4", "l4", "sm_89"),
        ("NVIDIA GeForce RTX 4090", "rtx4090", "sm_89"),
        ("NVIDIA GeForce RTX 5090", "rtx5090", "sm_120"),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_reports(by_the_driver, figures, sm):
    gpu = gpu_named(by_the_driver)
    assert (gpu.name, gpu.sm, capability(by_the_driver)) == (figures, sm, sm)


@pytest.mark.parametrize(
    ("by_the_driver", "sm"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "sm_89"),
        ("NVIDIA RTX 6000 Ada Generation", "sm_89"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "sm_120"),
        ("NVIDIA GH200 480GB", "sm_90"),
        ("Tesla T4", "sm_75"),
    ],
)
def test_a_gpu_without_figures_has_its_capability(by_the_driver, sm):
    assert capability(by_the_driver) == sm
    with pytest.raises(UnsupportedError, match="figures of GPU"):
        gpu_named(by_the_driver)


def test_several_names_give_each_capability_once():
    assert capabilities("rtx3090, rtx3080, rtx4090") == ("sm_86", "sm_89")


@pytest.mark.parametrize(("name", "nearest"), [("rtx3900", "rtx3090"), ("rtx409", "rtx4090")])
def test_an_unknown_gpu_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(UnsupportedError, match=f"Did you mean '{nearest}'"):
        capability(name)


def test_a_compute_capability_that_does_not_exist_is_refused():
    with pytest.raises(UnsupportedError, match="No GPU 'sm_33' is known"):
        capability("sm_33")


def test_the_figures_of_a_gpu_are_known_by_every_way_to_write_its_name():
    assert gpu_named("NVIDIA GeForce RTX 3090") == gpu_named("rtx3090")
    assert gpu_named("rtx3090").sm == "sm_86"
    assert not gpu_named("h200").has_int4


@pytest.mark.parametrize("name", ["rtx3080", "sm_86"])
def test_a_gpu_without_figures_is_refused_with_those_that_have_them(name):
    with pytest.raises(UnsupportedError, match=r"figures of GPU '.*' are not known.*Known: rtx3090, rtx4090"):
        gpu_named(name)


def test_every_gpu_with_figures_has_a_compute_capability_and_plausible_ones():
    for name in gpu_names():
        gpu = gpu_named(name)
        assert gpu.ops["float16"] < gpu.ops["int8"]
        assert 0.2e12 < gpu.dram < gpu.l2
        assert gpu.has_int4 == (gpu.sm in ("sm_80", "sm_86", "sm_89"))


def test_a_graph_launches_faster_than_a_stream():
    assert launch_seconds(graph=True) < launch_seconds(graph=False)
