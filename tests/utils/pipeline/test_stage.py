"""One stage as a module, without the pipeline around it. The pipeline itself: tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.family import BlockLayer, PipelineLayer
from models.streams import Sample, SampleShape, Streams, StreamSpec, pack
from utils.pipeline.stage import Stage, StagePlan

SHAPE = SampleShape(batch=2, height=1, width=3, num_text_tokens=0)
TOKENS = StreamSpec("tokens", lambda shape: shape.height * shape.width)
SCALE = StreamSpec("scale", lambda shape: 1, carries_gradient=False)
WIDTH = 4


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, WIDTH)

    def forward(self, inputs: Streams) -> Streams:
        return {"tokens": self.table(inputs["ids"]), "scale": self.table.weight[:1].expand(len(inputs["ids"]), 1, WIDTH)}


class Block(BlockLayer):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, streams: Streams) -> Streams:
        if self.skipped:
            return streams
        return {**streams, "tokens": self.linear(streams["tokens"]) * streams["scale"]}


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, streams: Streams) -> Tensor:
        return self.linear(streams["tokens"])


LAYERS = (
    PipelineLayer("embed", "", 1.0, {}, Embed, outputs=(TOKENS, SCALE)),
    PipelineLayer("block", "blocks.0.", 1.0, {}, Block, outputs=(TOKENS, SCALE), block=0),
    PipelineLayer("output", "out.", 1.0, {}, Output),
)


def stages(*bounds: int, frozen: bool = False) -> list[Stage]:
    """The stages of one network, with the same weights however it is cut."""

    def prepare(layer: PipelineLayer, module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(len(layer.name))
        for parameter in module.parameters():
            nn.init.normal_(parameter, generator=generator)
            parameter.requires_grad_(not frozen)

    plan = StagePlan(LAYERS, ("ids",), bounds)
    return [Stage(plan, index, prepare) for index in range(plan.num_stages)]


def run(parts: list[Stage], ids: Tensor) -> Tensor:
    value: Tensor | tuple[Tensor, ...] = parts[0].input_tuple(Sample({"ids": ids}, SHAPE), SHAPE)
    for part in parts:
        with part.expecting([SHAPE]):
            value = part(value)
    assert isinstance(value, Tensor)
    return value


IDS = torch.tensor([[0, 1, 2], [4, 4, 3]])


@pytest.mark.parametrize("bounds", [(0, 1, 3), (0, 2, 3), (0, 1, 2, 3)])
def test_stages_in_a_row_compute_what_one_stage_does(bounds: tuple[int, ...]) -> None:
    whole, cut = stages(0, 3), stages(*bounds)
    expected, output = run(whole, IDS), run(cut, IDS)
    assert torch.equal(output, expected)
    expected.sum().backward()
    output.sum().backward()
    gradients = {name: parameter.grad for part in cut for name, parameter in part.named_trainable().items()}
    wanted = {name: parameter.grad for name, parameter in whole[0].named_trainable().items()}
    assert list(gradients) == list(wanted)
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)  # type: ignore[arg-type]


def test_between_stages_travels_one_contiguous_float_tensor() -> None:
    first, *_ = stages(0, 1, 3)
    sent = run([first], IDS)
    assert sent.shape == (2, 3 + 1, WIDTH)
    assert sent.is_floating_point()
    assert sent.is_contiguous()
    assert sent.requires_grad


def test_parameters_are_named_natively_and_in_order() -> None:
    (stage,) = stages(0, 3)
    assert list(stage.named_trainable()) == ["table.weight", "blocks.0.linear.weight", "blocks.0.linear.bias"] + [
        "out.linear.weight",
        "out.linear.bias",
    ]
    assert [layer.index for layer in stages(0, 1, 3)[1].layers] == [1, 2]


def test_a_skipped_block_returns_its_streams_and_is_not_skipped_afterwards() -> None:
    (stage,) = stages(0, 3)
    with stage.skipping(frozenset({0})):
        skipped = run([stage], IDS)
    direct = stage.layers[2].module(stage.layers[0].module({"ids": IDS}))
    assert torch.equal(skipped, direct)
    assert not torch.equal(run([stage], IDS), skipped)
    with stage.skipping(frozenset({7})):  # a block of another stage
        assert not torch.equal(run([stage], IDS), skipped)


# --- shapes ------------------------------------------------------------------------------------------------------------


def test_each_forward_takes_the_next_announced_shape() -> None:
    _, second = stages(0, 1, 3)
    shapes = [SampleShape(1, 1, 2, 0), SampleShape(3, 2, 2, 0)]
    with second.expecting(shapes):
        for shape in shapes:
            tokens, scale = torch.randn(shape.batch, TOKENS.length(shape), WIDTH), torch.randn(shape.batch, 1, WIDTH)
            output = second(pack({"tokens": tokens, "scale": scale}, (TOKENS, SCALE)))
            assert output.shape == (shape.batch, TOKENS.length(shape), 1)
            assert second.current_shape == shape


def test_micro_batches_that_were_announced_and_not_forwarded_are_noticed() -> None:
    (stage,) = stages(0, 3)
    with pytest.raises(AssertionError, match="1 of 1 micro-batches were not forwarded"), stage.expecting([SHAPE]):
        pass


def test_a_sample_of_another_shape_than_announced_is_refused() -> None:
    (stage,) = stages(0, 3)
    with pytest.raises(AssertionError, match="was announced as"):
        stage.input_tuple(Sample({"ids": IDS}, SHAPE), SampleShape(2, 1, 4, 0))


@pytest.mark.parametrize("names", [(), ("ids", "more"), ("other",)])
def test_a_sample_of_other_tensors_than_declared_is_refused(names: tuple[str, ...]) -> None:
    (stage,) = stages(0, 3)
    with pytest.raises(AssertionError, match="are not"):
        stage.input_tuple(Sample(dict.fromkeys(names, IDS), SHAPE), SHAPE)


# --- the anchor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [0, 1])
def test_an_anchor_changes_no_output_and_receives_a_zero_gradient(dtype: torch.dtype, index: int) -> None:
    stage = stages(0, 1, 3, frozen=True)[index].to(dtype)
    inputs = (IDS,) if index == 0 else torch.randn(2, 4, WIDTH).to(dtype)
    with stage.expecting([SHAPE, SHAPE]):
        expected = stage(inputs)
        anchor = stage.add_anchor()
        output = stage(inputs)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    output.sum().backward()
    assert anchor.grad is not None
    assert anchor.grad == 0


def test_an_anchor_is_the_only_trainable_parameter_and_is_not_the_network_s() -> None:
    (stage,) = stages(0, 3, frozen=True)
    anchor = stage.add_anchor()
    assert [parameter for parameter in stage.parameters() if parameter.requires_grad] == [anchor]
    assert stage.named_trainable() == {}
