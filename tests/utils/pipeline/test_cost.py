"""The FLOPs of layers against those that torch counts, and which layers are timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from models.family import PipelineLayer
from models.sd3.family import SD3Family
from models.streams import Sample, SampleShape
from tests.tiny_model import write_experiment
from utils.distributed.world import World
from utils.pipeline.cost import PassCost, is_trained_before, training_flops
from utils.pipeline.measure import Measured, _inputs, layer_kinds, time_layer
from utils.run.experiment import Experiment
from utils.run.partition import random_sample
from utils.run.prepare import prepare

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
"""torch 2.13 counts attention in the kernels of GPUs only."""
SHAPE = (2, 8, 12)
"""Batch, height and width in latent pixels."""
LORA = {"type": "lora", "rank": 3, "targets": ["attn", "attn2", "mlp", "final_layer"]}
LAST_BLOCK = {"type": "lora", "rank": 3, "targets": [r"joint_blocks\.2\.x_block\.mlp.*"]}


def open_experiment(folder: Path, model: Path, dataset: Path, **changes: Any) -> Experiment:
    return prepare(write_experiment(folder, model, dataset, **changes), [], None, World(0, 0, 1, 1))


def trained_sizes(experiment: Experiment) -> list[Any]:
    return [experiment.trainable.parameter_sizes(layer) for layer in experiment.family.layers]


def measured_of(experiment: Experiment) -> Measured:
    family = experiment.family
    return Measured(
        family.layers,
        trained_sizes(experiment),
        experiment.trainable.prepare,
        random_sample(family, family.sample_shape(*SHAPE), torch.float32),
        family.stream_width,
        torch.float32,
    )


def counted(measured: Measured, index: int, module: nn.Module) -> PassCost:
    """What torch counts in the passes of a layer."""
    before = is_trained_before(measured.trained)[index]
    inputs = _inputs(measured, index, torch.device("cpu"), before)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        outputs = module(inputs)
        forward = counter.get_total_flops()
        values = [value for value in (outputs.values() if isinstance(outputs, dict) else [outputs]) if value.requires_grad]
        if values:
            torch.autograd.backward(values, [torch.ones_like(value) for value in values])
    return PassCost(forward, counter.get_total_flops() - forward)


@pytest.mark.parametrize("adapter", [None, LORA, LAST_BLOCK], ids=["full", "lora", "lora of the last block"])
def test_flops_of_every_layer_are_those_that_torch_counts(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, adapter: dict[str, Any] | None
) -> None:
    """One exception: the first trained layer of an adapter, where the gradients of its inputs are counted too."""
    changes = {} if adapter is None else {"adapter": adapter}
    measured = measured_of(experiment := open_experiment(tmp_path, tiny_model, tiny_dataset, **changes))
    shape = measured.sample.shape
    costs = training_flops(measured.layers, measured.trained, {shape: 1.0})
    first_trained = next(index for index, names in enumerate(measured.trained) if names)
    for index, (layer, cost) in enumerate(zip(measured.layers, costs, strict=True)):
        module = layer.build()
        experiment.trainable.prepare(layer, module)
        expected = counted(measured, index, module)
        assert cost.forward == pytest.approx(expected.forward, rel=1e-9), layer.name
        if adapter is None or index != first_trained:
            assert cost.backward == pytest.approx(expected.backward, rel=1e-9), layer.name
        else:
            assert cost.backward >= expected.backward
    assert all(cost.backward == 0 for cost in costs[:first_trained])


def variant_flops(name: str, pixels: int) -> list[PassCost]:
    """The layers of a released network in full training, for one image."""
    family = SD3Family.from_variant(name)
    shape = SampleShape(1, pixels // 8, pixels // 8, num_text_tokens=333)
    trained = [{layer.prefix + part: 1 for part in layer.shapes} for layer in family.layers]
    return training_flops(family.layers, trained, {shape: 1.0})


@pytest.mark.parametrize(("name", "tera"), [("SD3.5-medium", 11.2), ("SD3.5-large", 31.1)])
def test_forward_flops_of_released_networks_at_1024_pixels(name: str, tera: float) -> None:
    assert sum(cost.forward for cost in variant_flops(name, 1024)) == pytest.approx(tera * 1e12, rel=0.01)


def test_blocks_with_a_second_attention_cost_more_and_the_more_so_at_higher_resolution() -> None:
    ratios = []
    for pixels in (256, 1024):
        costs = variant_flops("SD3.5-medium", pixels)
        assert costs[1] == costs[13]
        assert costs[14] == costs[23]
        assert costs[24].forward < costs[23].forward, "the last block updates no text"
        ratios.append(costs[13].forward / costs[14].forward)
    assert 1.1 < ratios[0] < ratios[1]


def test_flops_are_averaged_over_the_draws_of_each_shape() -> None:
    family = SD3Family.from_variant("SD3-medium")
    small, large = (SampleShape(1, side, side, 154) for side in (32, 64))
    trained: list[dict[str, int]] = [{} for _ in family.layers]
    one, other, both = (
        training_flops(family.layers, trained, draws) for draws in ({small: 1.0}, {large: 1.0}, {small: 3.0, large: 1.0})
    )
    for a, b, mean in zip(one, other, both, strict=True):
        assert mean.forward == pytest.approx(0.75 * a.forward + 0.25 * b.forward)
        assert mean.backward == 0
    assert {cost.forward for cost in training_flops(family.layers, trained, {})} == {0.0}


# --- timing --------------------------------------------------------------------------------------------------------------


def test_layers_that_compute_the_same_are_timed_once(tmp_path: Path, tiny_model: Path, tiny_dataset: Path) -> None:
    """Embedders, a block with a second attention, a plain one, the last one, the output layer."""
    assert layer_kinds(measured_of(open_experiment(tmp_path, tiny_model, tiny_dataset))) == [0, 1, 2, 3, 4]
    family = SD3Family.from_variant("SD3.5-medium")
    sizes = [{layer.prefix + name: 1 for name in layer.shapes} for layer in family.layers]

    def kinds(trained: list[dict[str, int]]) -> list[int]:
        sample = Sample({}, SampleShape(1, 32, 32, 154))
        return layer_kinds(Measured(family.layers, trained, lambda *_: None, sample, 1536, torch.float32))

    assert kinds(sizes) == [0, *[1] * 13, *[14] * 10, 24, 25]
    only_fourth: list[dict[str, int]] = [names if index == 4 else {} for index, names in enumerate(sizes)]
    assert kinds(only_fourth) == [0, 1, 1, 1, 4, *[5] * 9, *[14] * 10, 24, 25]


def test_a_layer_is_timed_in_its_own_state_and_precision_and_reads_no_weights(
    tmp_path: Path, tiny_model: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = open_experiment(tmp_path, tiny_model, tiny_dataset, adapter=LAST_BLOCK)
    measured = measured_of(experiment)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for layer in measured.layers:
        assert isinstance(layer, PipelineLayer)
        monkeypatch.setitem(vars(layer), "build", None)
    times = [time_layer(measured, index, torch.device("cpu")) for index in range(len(measured.layers))]
    assert all(cost.forward > 0 for cost in times)
    assert [cost.backward > 0 for cost in times] == [False, False, False, True, True]
    assert torch.equal(state, torch.get_rng_state())
