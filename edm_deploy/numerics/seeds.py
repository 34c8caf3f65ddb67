"""The range of random seeds, and seeds that are derived from one."""

from __future__ import annotations

from numbers import Integral

from edm_deploy.errors import InputError

LARGEST_SEED = 2**63 - 1  # torch's generators take 64 bits, and some seeds are derived by adding 1
PRIME = 1_000_003  # keeps the seeds that are derived from neighbouring seeds apart


def check_seed(seed: int) -> None:
    """Raises InputError where `seed` is not an integer from 0 to LARGEST_SEED."""
    if not isinstance(seed, Integral) or not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed is {seed!r}; expected an integer from 0 to {LARGEST_SEED}. Set another seed.")


def derived_seed(seed: int, number: int) -> int:
    """The seed of part `number`, 0 or more, of what `seed` decides; at most LARGEST_SEED."""
    return (PRIME * seed + number) % (LARGEST_SEED + 1)
