"""Which replica owns which trained parameter, and in which buckets parameters travel between replicas. Pure.

Of the replicas of a stage, one owns each parameter: it holds the float32 weights and the optimizer's state, and updates
them. Parameters are owned whole, because some optimizers need the matrix and checkpoints are saved by parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_BUCKET_ELEMENTS = 2**24
"""64 MiB of float32: the memory that sending gradients or weights needs on top."""


@dataclass(frozen=True)
class Bucket:
    """Parameters of one owner that are sent as one vector."""

    owner: int
    members: tuple[int, ...]
    """Positions in the list of a stage's parameters, ascending."""


def assign_owners(sizes: Sequence[int], num_replicas: int) -> list[int]:
    """Returns the owner of each parameter: the largest first, each to the replica with the smallest share so far."""
    shares, owners = [0] * num_replicas, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        owner = shares.index(min(shares))
        owners[index] = owner
        shares[owner] += sizes[index]
    return owners


def make_buckets(sizes: Sequence[int], owners: Sequence[int], max_elements: int = MAX_BUCKET_ELEMENTS) -> list[Bucket]:
    """Returns buckets of at most `max_elements`; a larger parameter is alone in its bucket.

    They are in the order in which a backward pass completes them, which reaches the last parameter first.
    """
    buckets: list[Bucket] = []
    open_members: dict[int, list[int]] = {}
    for index in reversed(range(len(sizes))):
        members = open_members.setdefault(owners[index], [])
        if members and sum(sizes[member] for member in members) + sizes[index] > max_elements:
            buckets.append(Bucket(owners[index], tuple(reversed(members))))
            members.clear()
        members.append(index)
    rest = [Bucket(owner, tuple(reversed(members))) for owner, members in open_members.items()]
    return sorted(buckets + rest, key=lambda bucket: -bucket.members[0])
