"""Named streams, and the one tensor in which they travel between stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.streams import SampleShape, Streams, StreamSpec, pack, passed_on, unpack

WIDTH = 4
SHAPE = SampleShape(batch=2, height=2, width=3, num_text_tokens=5)
IMAGE = StreamSpec("image", lambda shape: shape.height * shape.width)
TEXT = StreamSpec("text", lambda shape: shape.num_text_tokens)
ROW = StreamSpec("row", lambda shape: 1)
CONSTANT = StreamSpec("constant", lambda shape: 3, carries_gradient=False)


def streams_of(*specs: StreamSpec) -> Streams:
    return {spec.name: torch.randn(SHAPE.batch, spec.length(SHAPE), WIDTH, requires_grad=True) for spec in specs}


@pytest.mark.parametrize("num_text_tokens", [0, 1, 7])
@pytest.mark.parametrize("specs", [(TEXT, IMAGE, ROW), (ROW, TEXT, IMAGE, CONSTANT), (IMAGE,)])
def test_unpack_is_the_inverse_of_pack(specs: tuple[StreamSpec, ...], num_text_tokens: int) -> None:
    shape = SampleShape(2, 2, 3, num_text_tokens)
    streams = {spec.name: torch.randn(shape.batch, spec.length(shape), WIDTH) for spec in specs}
    packed = pack(streams, specs)
    assert packed.shape == (2, sum(spec.length(shape) for spec in specs), WIDTH)
    assert packed.is_contiguous()
    unpacked = unpack(packed, specs, shape)
    assert list(unpacked) == [spec.name for spec in specs]
    for name, tensor in unpacked.items():
        assert torch.equal(tensor, streams[name])
        assert tensor.is_contiguous()


def test_streams_are_packed_in_the_declared_order() -> None:
    streams = streams_of(IMAGE, TEXT)
    assert torch.equal(pack(streams, (TEXT, IMAGE))[:, :5], streams["text"])
    assert torch.equal(pack(streams, (IMAGE, TEXT))[:, :6], streams["image"])


def test_gradients_pass_through_a_boundary_unchanged() -> None:
    specs = (TEXT, IMAGE, ROW)
    streams, factors = streams_of(*specs), {spec.name: torch.randn(2, spec.length(SHAPE), WIDTH) for spec in specs}
    received = unpack(pack(streams, specs), specs, SHAPE)
    total = torch.stack([(received[name] * factor).sum() for name, factor in factors.items()]).sum()
    gradients = torch.autograd.grad(total, list(streams.values()))
    assert all(torch.equal(one, other) for one, other in zip(gradients, factors.values(), strict=True))


def test_a_stream_that_carries_no_gradient_has_none_on_either_side() -> None:
    specs = (TEXT, CONSTANT)
    streams = streams_of(*specs)
    received = unpack(pack(streams, specs), specs, SHAPE)
    assert received["text"].requires_grad
    assert not received["constant"].requires_grad
    assert not passed_on(streams, specs)["constant"].requires_grad
    pack(streams, specs).sum().backward()
    assert streams["text"].grad is not None
    assert streams["constant"].grad is None


@pytest.mark.parametrize("returned", [(TEXT,), (TEXT, IMAGE, ROW)])
def test_streams_other_than_the_declared_ones_are_refused(returned: tuple[StreamSpec, ...]) -> None:
    with pytest.raises(AssertionError, match=r"declares the streams \['image', 'text'\] and returns"):
        pack(streams_of(*returned), (TEXT, IMAGE))


def test_streams_of_several_dtypes_are_refused() -> None:
    streams: dict[str, Tensor] = streams_of(TEXT, IMAGE)
    streams["text"] = streams["text"].to(torch.bfloat16)
    with pytest.raises(AssertionError, match="several dtypes"):
        pack(streams, (TEXT, IMAGE))


@pytest.mark.parametrize(
    "shape", [SampleShape(2, 2, 3, 4), SampleShape(2, 3, 3, 5), SampleShape(1, 2, 3, 5)], ids=["text", "size", "batch"]
)
def test_a_packed_tensor_of_another_shape_is_refused(shape: SampleShape) -> None:
    packed = pack(streams_of(TEXT, IMAGE), (TEXT, IMAGE))
    with pytest.raises(ValueError, match=r"a packed tensor of shape \(2, 11, 4\) does not hold streams of"):
        unpack(packed, (TEXT, IMAGE), shape)
