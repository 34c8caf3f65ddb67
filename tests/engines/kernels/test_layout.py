"""The layout itself is tested at its home, tests/edm_deploy/test_packing.py."""

from edm_deploy import packing
from engines.kernels import layout


def test_the_kernels_and_the_exporter_pack_by_the_same_functions():
    assert all(getattr(layout, name) is getattr(packing, name) for name in layout.__all__)
