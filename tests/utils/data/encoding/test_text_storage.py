"""Stored text embeddings: rounding errors and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from utils.data.encoding.text_storage import TextCacheDtype, pack, packed_bytes, unpack

BFLOAT16, FLOAT8 = torch.finfo(torch.bfloat16), torch.finfo(torch.float8_e4m3fn)
FLOAT8_ROUNDOFF = 2**-4
"""Relative rounding error of float8_e4m3fn."""
SMALLEST_STEP = 2**-9
"""Distance of float8 numbers below the smallest normal number."""
FLOAT32_SLACK = 1 + 2**-20
"""Allows for the rounding of the division by the scale and the multiplication by it."""


def sequence_like_t5() -> Tensor:
    """Returns tokens (64, 512) whose magnitudes differ by orders, each with an outlier and with values near zero."""
    numbers = torch.randn(64, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers *= torch.logspace(-4, 3, 64, dtype=torch.float64)[:, None]
    numbers[:, 7] *= 50
    numbers[:, :3] *= 1e-5
    return numbers.float()


def round_trip(tensor: Tensor, dtype: TextCacheDtype | None) -> Tensor:
    return unpack(pack({"sequence": tensor}, dtype))["sequence"]


def test_the_error_of_bfloat16_is_its_rounding_error() -> None:
    sequence = sequence_like_t5()
    error = (round_trip(sequence, "bfloat16").double() - sequence.double()).abs()
    bound = sequence.double().abs() * 2**-8
    assert (error <= bound).all()
    assert (error > bound / 2).any(), "the bound is tight"
    assert BFLOAT16.eps == 2**-7


def test_the_error_of_float8_is_its_rounding_error_or_half_its_smallest_step() -> None:
    """For a token with largest magnitude L: |error| <= max(2^-4 |x|, 2^-10 L / 448)."""
    assert (FLOAT8.max, FLOAT8.smallest_normal, FLOAT8.eps) == (448, 2**-6, 2 * FLOAT8_ROUNDOFF)
    sequence = sequence_like_t5()
    values, largest = sequence.double().abs(), sequence.double().abs().amax(dim=1, keepdim=True)
    error = (round_trip(sequence, "float8_e4m3fn").double() - sequence.double()).abs()
    relative, absolute = values * FLOAT8_ROUNDOFF, (SMALLEST_STEP / 2 * largest / FLOAT8.max).expand_as(values)
    assert (error <= torch.maximum(relative, absolute) * FLOAT32_SLACK).all()
    assert (error > 0.9 * relative)[relative > absolute].any(), "the bounds are tight"
    assert (error > 0.9 * absolute)[absolute > relative].any()


def test_the_largest_value_of_each_token_is_kept() -> None:
    sequence = sequence_like_t5()
    places = sequence.abs().argmax(dim=1, keepdim=True)
    kept = round_trip(sequence, "float8_e4m3fn").gather(1, places)
    torch.testing.assert_close(kept, sequence.gather(1, places), rtol=2**-22, atol=0)


def test_a_large_token_does_not_change_other_tokens() -> None:
    sequence = sequence_like_t5()
    alone = round_trip(sequence[:1], "float8_e4m3fn")
    assert torch.equal(round_trip(torch.cat([sequence[:1], sequence[-1:] * 1e6]), "float8_e4m3fn")[:1], alone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_zeros_stay_zeros(dtype: TextCacheDtype) -> None:
    """Padding is zero, and so are sequences of encoders that are not used."""
    sequence = sequence_like_t5()[:4]
    sequence[[1, 3]] = 0
    back = round_trip(sequence, dtype)
    assert (back[[1, 3]] == 0).all()
    assert (back[[0, 2]] != 0).any(dim=1).all()
    assert torch.equal(round_trip(torch.zeros(3, 5), dtype).float(), torch.zeros(3, 5))


@pytest.mark.parametrize("largest", [2**-149, 1e-42, 1e-39, 1e-30, 1e30, 3.4e38])
def test_values_of_any_magnitude_stay_finite(largest: float) -> None:
    sequence = torch.tensor([[largest, -largest / 2, largest / 3, 0]])
    back = round_trip(sequence, "float8_e4m3fn")
    assert back.isfinite().all()
    torch.testing.assert_close(back, sequence, rtol=FLOAT8_ROUNDOFF, atol=1e-37)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
def test_unpacked_dtypes(own: torch.dtype) -> None:
    sequence = sequence_like_t5()[:8].to(own)
    assert round_trip(sequence, "float8_e4m3fn").dtype == torch.float32
    assert round_trip(sequence, "bfloat16").dtype == torch.bfloat16
    assert round_trip(sequence, None).dtype == own
    assert torch.equal(round_trip(sequence, None), sequence)


def test_pooled_vectors_are_stored_in_bfloat16_instead_of_float8() -> None:
    pooled = sequence_like_t5()[0]
    packed = pack({"pooled": pooled, "sequence": sequence_like_t5()}, "float8_e4m3fn")
    assert {name: tensor.dtype for name, tensor in packed.items()} == {
        "pooled": torch.bfloat16,
        "sequence": torch.float8_e4m3fn,
        "sequence_scale": torch.float32,
    }
    assert packed["sequence_scale"].shape == (64, 1)
    assert torch.equal(unpack(packed)["pooled"], pooled.to(torch.bfloat16))
    assert unpack(packed).keys() == {"pooled", "sequence"}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float8_e4m3fn"])
def test_integers_are_kept(dtype: TextCacheDtype | None) -> None:
    length = torch.tensor([[2**31 + 1, 77]])
    packed = pack({"length": length}, dtype)
    assert packed.keys() == {"length"}
    assert torch.equal(unpack(packed)["length"], length)
    assert unpack(packed)["length"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_packed_bytes_is_the_size_of_packed_tensors(dtype: TextCacheDtype | None, own: torch.dtype) -> None:
    shapes = {"sequence": (77, 24), "pooled": (24,)}
    packed = pack({name: torch.ones(shape, dtype=own) for name, shape in shapes.items()}, dtype)
    assert packed_bytes(shapes, dtype, own) == sum(tensor.nbytes for tensor in packed.values())


def test_float8_takes_half_the_bytes_of_bfloat16() -> None:
    shapes = {"sequence": (333, 4096)}
    halves = packed_bytes(shapes, "bfloat16", torch.float32), packed_bytes(shapes, None, torch.float32)
    assert halves == (333 * 4096 * 2, 333 * 4096 * 4)
    assert packed_bytes(shapes, "float8_e4m3fn", torch.float32) == 333 * 4096 + 333 * 4
