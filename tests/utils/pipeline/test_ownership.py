"""Ownership of parameters is balanced, and buckets hold every parameter once."""

from __future__ import annotations

import random

import pytest

from utils.pipeline.ownership import assign_owners, make_buckets

SIZES = [random.Random(index).choice([1, 64, 4096, 4096 * 16, 2**20]) for index in range(300)]


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
def test_owners_have_equal_shares_up_to_one_parameter(num_replicas: int) -> None:
    owners = assign_owners(SIZES, num_replicas)
    shares = [sum(size for size, owner in zip(SIZES, owners, strict=True) if owner == one) for one in range(num_replicas)]
    assert sum(shares) == sum(SIZES)
    assert max(shares) - min(shares) <= 1 or max(shares) < 1.01 * sum(SIZES) / num_replicas


def test_the_largest_parameters_have_different_owners() -> None:
    assert assign_owners([5, 100, 5, 100, 90], 3) == [2, 0, 2, 1, 2]


def test_with_fewer_parameters_than_replicas_some_own_nothing() -> None:
    assert assign_owners([3, 3], 4) == [0, 1]
    assert assign_owners([], 4) == []


@pytest.mark.parametrize("max_elements", [1, 5000, 2**24])
def test_buckets_hold_each_parameter_once_with_its_owner(max_elements: int) -> None:
    owners = assign_owners(SIZES, 3)
    buckets = make_buckets(SIZES, owners, max_elements)
    assert sorted(member for bucket in buckets for member in bucket.members) == list(range(len(SIZES)))
    for bucket in buckets:
        assert {owners[member] for member in bucket.members} == {bucket.owner}
        assert len(bucket.members) == 1 or sum(SIZES[member] for member in bucket.members) <= max_elements


def test_there_are_no_more_buckets_than_necessary() -> None:
    assert [bucket.members for bucket in make_buckets([4, 4, 4, 9, 1], [0, 0, 0, 0, 1], 8)] == [(4,), (3,), (1, 2), (0,)]
