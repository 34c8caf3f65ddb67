"""Which samples the next call of the engine computes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

AGEING = 4  # calls that a group waits for as much priority as a full batch has


@dataclass(frozen=True)
class Candidate:
    """A sample that waits for a call.

    Attributes:
        order: Smaller is earlier.
        rows: Rows that it takes: 1, or 2 with classifier-free guidance.
        key: Samples of one call have the same key: shapes of their inputs, and the engine that their timestep is routed to.
    """

    order: float
    rows: int
    key: Hashable


def order_of(arrival: int, image: int, steps: int) -> float:
    """Order of an image of a request: as if the request had one slot and computed its images one after the other.

    So the first images of a later request precede the last ones of a long one, and an image waits for no request that arrives `image * steps` calls
    after its own: each is computed in the end.

    Args:
        arrival: Calls of the engine before the request arrived.
        image: Index of the image in its request.
        steps: Calls that an image of it takes.

    Source: start-time fair queueing, Goyal et al., IEEE/ACM Transactions on Networking 5 (5), 1997.
    """
    return arrival + image * steps


def select(candidates: Sequence[Candidate], slots: int, waited: Mapping[Hashable, int]) -> list[int]:
    """Indices of the candidates of the next call.

    Of each group, the candidates of one key, the earliest that fit. Of the groups, the one that fills more slots, plus a full batch for every AGEING
    calls that it has waited: it waits for about AGEING calls for each other group at most.

    Args:
        candidates: Samples that wait.
        slots: Rows of a call; 2 or more where a candidate has 2 rows.
        waited: Calls since a group was selected, by key; 0 where missing.
    """
    groups: dict[Hashable, list[int]] = {}
    filled: dict[Hashable, int] = {}
    for index in sorted(range(len(candidates)), key=lambda at: candidates[at].order):
        candidate = candidates[index]
        members = groups.setdefault(candidate.key, [])
        used = filled.setdefault(candidate.key, 0)
        if used + candidate.rows <= slots:
            members.append(index)
            filled[candidate.key] = used + candidate.rows
    if not groups:
        return []
    # Of equals the first, which has the earliest candidate.
    return groups[max(groups, key=lambda key: filled[key] / slots + waited.get(key, 0) / AGEING)]
