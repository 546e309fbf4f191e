"""One stage as a module, without the pipeline around it. The pipeline itself: tests/distributed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.family import BlockLayer, PipelineLayer
from models.streams import Sample, SampleShape, Streams, StreamSpec
from tests.distributed.toy_network import no_cost
from utils.pipeline.recompute import Recompute
from utils.pipeline.stage import Stage, StagePlan

SHAPE = SampleShape(batch=2, height=1, width=3, num_text_tokens=0)
TOKENS = StreamSpec("tokens", lambda shape: shape.height * shape.width)
SCALE = StreamSpec("scale", lambda shape: 1, carries_gradient=False)
WIDTH = 4
NO_RECOMPUTE = Recompute()


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

    def recompute_norms(self, active: bool) -> None:
        assert not active, "it has no norms"

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
    PipelineLayer("embed", "", no_cost, {}, Embed, outputs=(TOKENS, SCALE)),
    PipelineLayer("block", "blocks.0.", no_cost, {}, Block, outputs=(TOKENS, SCALE), block=0),
    PipelineLayer("output", "out.", no_cost, {}, Output),
)


def stages(*bounds: int, recompute: Recompute = NO_RECOMPUTE) -> list[Stage]:
    """The stages of one network, with the same weights however it is cut."""

    def prepare(layer: PipelineLayer, module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(len(layer.name))
        for parameter in module.parameters():
            nn.init.normal_(parameter, generator=generator)

    plan = StagePlan(LAYERS, ("ids",), WIDTH, bounds, recompute)
    return [Stage(plan, index, prepare, torch.float32) for index in range(plan.num_stages)]


def run(parts: list[Stage], ids: Tensor) -> Tensor:
    value: Streams | Tensor = {"ids": ids}
    for part in parts:
        value = part(value, SHAPE)
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


def test_a_stage_knows_the_size_of_what_it_receives() -> None:
    first, second = stages(0, 1, 3)
    for shape in (SampleShape(1, 1, 2, 0), SampleShape(3, 2, 2, 0)):
        ids = torch.zeros(shape.batch, TOKENS.length(shape), dtype=torch.long)
        sent = first({"ids": ids}, shape)
        assert sent.shape == second.received_size(shape)
        assert second(sent, shape).shape == (shape.batch, TOKENS.length(shape), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_get_the_dtype_of_the_training_and_buffers_keep_theirs(dtype: torch.dtype) -> None:
    def prepare(_layer: PipelineLayer, module: nn.Module) -> None:
        module.register_buffer("constant", torch.ones(1))

    stage = Stage(StagePlan(LAYERS, ("ids",), WIDTH, (0, 3)), 0, prepare, dtype)
    assert {parameter.dtype for parameter in stage.parameters()} == {dtype}
    assert {buffer.dtype for buffer in stage.buffers()} == {torch.float32}


def test_a_sample_of_another_shape_than_announced_is_refused() -> None:
    (stage,) = stages(0, 3)
    with pytest.raises(AssertionError, match="was announced as"):
        stage.check_sample(Sample({"ids": IDS}, SHAPE), SampleShape(2, 1, 4, 0))


@pytest.mark.parametrize("names", [(), ("ids", "more"), ("other",)])
def test_a_sample_of_other_tensors_than_declared_is_refused(names: tuple[str, ...]) -> None:
    (stage,) = stages(0, 3)
    with pytest.raises(AssertionError, match="are not"):
        stage.check_sample(Sample(dict.fromkeys(names, IDS), SHAPE), SHAPE)


# --- recompute ---------------------------------------------------------------------------------------------------------


def test_the_first_blocks_of_each_stage_are_recomputed() -> None:
    block = PipelineLayer("block", "blocks.", no_cost, {}, Block, outputs=(TOKENS, SCALE), block=0)
    layers = (LAYERS[0], *[replace(block, block=index) for index in range(5)], LAYERS[2])
    for count, expected in ((0, [[], []]), (1, [[1], [4]]), (2, [[1, 2], [4, 5]]), (9, [[1, 2, 3], [4, 5]])):
        plan = StagePlan(layers, ("ids",), WIDTH, (0, 4, 7), Recompute("all", count))
        built = [Stage(plan, index, lambda _layer, _module: None, torch.float32) for index in range(2)]
        assert [sorted(stage._modes) for stage in built] == expected
        assert [plan.num_blocks(index) for index in range(2)] == [3, 2]


def test_a_recomputed_block_keeps_its_inputs_only_and_gives_the_same_gradients() -> None:
    kept, gradients = [], []
    for count in (0, 1):
        (stage,) = stages(0, 3, recompute=Recompute("all", count))
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = stage({"ids": IDS}, SHAPE)
        output.sum().backward()
        kept.append(sum(sizes))
        gradients.append([parameter.grad for parameter in stage.parameters()])
    assert kept[1] < kept[0]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))  # type: ignore[arg-type]
