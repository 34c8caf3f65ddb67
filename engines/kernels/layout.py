"""The packed layout by the name that the kernels know it by; its home is `edm_deploy/packing.py`, because the exporter packs for plugin nodes too."""

from edm_deploy.packing import (
    CHUNK,
    KINDS,
    bits_of,
    check_unsigned,
    code_bytes,
    pack_codes,
    pack_weight,
    unpack_codes,
    weight_sum,
    zero_codes,
)

__all__ = [
    "CHUNK",
    "KINDS",
    "bits_of",
    "check_unsigned",
    "code_bytes",
    "pack_codes",
    "pack_weight",
    "unpack_codes",
    "weight_sum",
    "zero_codes",
]
