"""Recompute modes on the blocks of the SD3 network: bits, kept bytes, repeated products, and the choice of what fits."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.family import PipelineLayer
from models.sd3.layers import INPUT_NAMES, layer_outputs, layer_prefix, make_layer, num_layers
from models.sd3.network_shapes import adaptable_modules
from models.sd3.variants import MMDiTConfig
from models.streams import SampleShape, Streams
from tests.distributed.toy_network import no_cost
from utils.pipeline import recompute
from utils.pipeline.recompute import CreatedBytes, Mode, Recompute, least_recompute
from utils.pipeline.stage import Stage, StagePlan
from utils.trainable.peft_layers import inject
from utils.trainable.targets import LoraTarget, LoraTargets

CONFIG = MMDiTConfig(2, 4, 3, 128, 32, 24, 16, qk_norm=True, dual_attention_layers=(0,))
SHAPE = SampleShape(batch=2, height=16, width=24, num_text_tokens=20)
MODES = get_args(Mode)
TARGETS = LoraTargets(
    "lora",
    rank_stabilized=False,
    dora=False,
    modules={
        name: LoraTarget(shape, 4, 4.0)
        for name, shape in adaptable_modules(CONFIG).items()
        if ".attn" in name or ".mlp." in name
    },
)
NUM_LAYERS = num_layers(CONFIG)


def make_stage(*, lora: bool, dtype: torch.dtype, recompute: Recompute, bounds: tuple[int, ...] = (0, NUM_LAYERS)) -> Stage:
    """The last stage of the network, whose weights do not depend on `bounds`."""

    def prepare(layer: PipelineLayer, module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(len(layer.prefix) + ord(layer.prefix[-2:-1] or " "))
        if lora:
            module.requires_grad_(False)
            inject(module, layer.prefix, TARGETS, seed=0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)

    layers = tuple(
        PipelineLayer(
            name=f"layer {index}",
            prefix=layer_prefix(CONFIG, index),
            cost=no_cost,
            shapes={},
            build=partial(make_layer, CONFIG, index),
            outputs=layer_outputs(CONFIG, index),
            block=index - 1 if 0 < index <= CONFIG.depth else None,
        )
        for index in range(NUM_LAYERS)
    )
    plan = StagePlan(layers, INPUT_NAMES, CONFIG.hidden_size, bounds, recompute)
    return Stage(plan, plan.num_stages - 1, prepare, dtype)


def make_inputs(dtype: torch.dtype) -> Streams:
    """The inputs of the first layer."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(SHAPE.batch, *size, generator=generator)

    return {
        "noisy_latents": normal(CONFIG.in_channels, SHAPE.height, SHAPE.width).to(dtype),
        "timestep": normal().abs() * 500,
        "context": normal(SHAPE.num_text_tokens, CONFIG.context_dim).to(dtype),
        "pooled": normal(CONFIG.pooled_dim).to(dtype),
    }


class Products(TorchDispatchMode):
    """Counts matrix products and runs of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.counts["attention" if "attention" in name and "backward" not in name else name] += 1
        return function(*args, **(kwargs or {}))


def train(stage: Stage, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], int]:
    """Output, gradients by parameter name, and bytes kept between forward and backward."""
    with CreatedBytes() as created:
        output = stage(make_inputs(dtype), SHAPE)
        kept = created.alive
    output.float().square().mean().backward()
    return output.detach(), {name: one.grad for name, one in stage.named_trainable().items() if one.grad is not None}, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_no_mode_changes_a_bit_and_each_keeps_less_than_the_one_before(lora: bool, dtype: torch.dtype) -> None:
    kept = []
    output, gradients, most = train(make_stage(lora=lora, dtype=dtype, recompute=Recompute()), dtype)
    assert gradients
    for mode in MODES:
        other, found, size = train(make_stage(lora=lora, dtype=dtype, recompute=Recompute(mode, CONFIG.depth)), dtype)
        assert torch.equal(other, output), mode
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items()), mode
        kept.append(size / most)
    assert 1 > kept[0] > kept[1] > kept[2], kept
    assert kept[2] < 0.25


@pytest.mark.parametrize(
    ("mode", "linears", "attentions"), [("norms", 0, 0), ("matmuls", 0, 0), ("all", 1, 1)], ids=lambda value: str(value)
)
def test_products_that_are_computed_again(mode: Mode, linears: int, attentions: int) -> None:
    """The modes "norms" and "matmuls" repeat no linear layer and no attention; "all" repeats those of the blocks once."""
    counts = []
    for chosen in (Recompute(), Recompute(mode, CONFIG.depth)):
        stage = make_stage(lora=False, dtype=torch.float32, recompute=chosen)
        with Products() as products:
            stage(make_inputs(torch.float32), SHAPE).square().mean().backward()
        counts.append(products.counts)
    assert counts[1]["attention"] - counts[0]["attention"] == attentions * (CONFIG.depth + 1)
    in_blocks = 3 * 2 * 5 - 3 + 2  # qkv, proj, fc1, fc2, adaLN of two streams; no proj, fc1, fc2 of the last text; attn2
    repeated = counts[1]["addmm"] - counts[0]["addmm"]
    assert repeated == 0 if not linears else in_blocks - 2 * CONFIG.depth < repeated <= in_blocks


# --- the least that fits -------------------------------------------------------------------------------------------------


def test_the_measured_bytes_are_those_that_a_pass_keeps() -> None:
    stage = make_stage(lora=True, dtype=torch.bfloat16, recompute=Recompute())
    blocks = stage.measure_blocks(make_inputs(torch.bfloat16), SHAPE)
    assert len(blocks) == CONFIG.depth
    _, _, most = train(stage, torch.bfloat16)
    inputs = SHAPE.batch * (SHAPE.height * SHAPE.width // 4 + SHAPE.num_text_tokens) * CONFIG.hidden_size * 2
    outside = most - sum(block[None] for block in blocks)
    assert 0 < outside < 0.25 * most, "embedders and output layer"
    for mode in MODES:
        stage.set_recompute(Recompute(mode, CONFIG.depth))
        _, _, kept = train(stage, torch.bfloat16)
        # A frozen first layer: only where blocks are recomputed is its output kept.
        assert -0.05 * kept <= kept - outside - sum(block[mode] for block in blocks) <= inputs + 0.05 * kept, mode


BLOCKS = [{None: 100, "norms": 70, "matmuls": 50, "all": 10}] * 4


@pytest.mark.parametrize(("free", "in_flight"), [(400, 1), (800, 2), (10_000, 4)])
def test_nothing_is_recomputed_where_everything_fits(free: int, in_flight: int) -> None:
    found = least_recompute(BLOCKS, in_flight, free)
    assert found is not None
    assert found.num_blocks == 0


def test_the_least_that_is_possible_and_less() -> None:
    assert least_recompute(BLOCKS, 1, 165) == Recompute("all", 4)  # 4 x 10, and 125 for the backward pass of a block
    assert least_recompute(BLOCKS, 1, 164) is None


def test_of_modes_that_fit_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "RELATIVE_TIME", {"norms": 0.05, "matmuls": 0.12, "all": 0.35})
    many = [{None: 1000, "norms": 700, "matmuls": 500, "all": 100}] * 100
    small = least_recompute(many, 1, 99_000)
    assert small == Recompute("norms", 8)  # 300 less each; 1,250 for the backward pass
    assert least_recompute(many, 1, 60_000) == Recompute("matmuls", 83)
    assert least_recompute(many, 1, 20_000) == Recompute("all", 91)


# --- streams without gradient ----------------------------------------------------------------------------------------------


def test_a_later_stage_keeps_nothing_for_the_gradient_of_a_frozen_conditioning() -> None:
    kept, gradients = [], []
    for names in (["joint_blocks.0.x_block.attn.qkv.lora_A.default.weight"], ["t_embedder.mlp.0.weight"]):
        stage = make_stage(lora=True, dtype=torch.bfloat16, recompute=Recompute(), bounds=(0, 2, NUM_LAYERS))
        stage.set_trained_before(names)
        size = stage.received_size(SHAPE)
        received = torch.randn(size, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
        with CreatedBytes() as created:
            output = stage(received, SHAPE)
            kept.append(created.alive)
        output.float().square().mean().backward()
        assert received.grad is not None
        gradients.append([received.grad[:, :-1], *[one.grad for one in stage.named_trainable().values()]])
        assert bool(received.grad[:, -1].any()) == names[0].startswith("t_embedder")
    assert kept[0] < 0.9 * kept[1], kept
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
