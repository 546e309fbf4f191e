"""The network cut over processes, on DeepSpeed's pipeline engine. One of the two files that import it.

What this file adds to the engine, and why (DeepSpeed 0.19.8):
* each rank builds and reads its own layers only (`_StageSpec`), at boundaries given from outside;
* a stage in which nothing is trained gets an anchor, a parameter that is multiplied by zero: the engine needs something
  to run backward through and the optimizer something to hold;
* the norm that clips is summed in float64 over all stages before it is rounded once, so that the number of stages does
  not change its last bits and with them the run;
* shapes are announced anew in every step, because steps differ in bucket.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

import utils.distributed.group  # noqa: F401  before DeepSpeed: it sets what DeepSpeed reads from the environment
from models.family import BlockLayer, PipelineLayer
from utils.pipeline.feed import MicroBatch
from utils.pipeline.optimizer_state import flat_partitions, read_state, read_weights, update_ema, write_states

LossFunction = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
PrepareLayer = Callable[[PipelineLayer, nn.Module], None]
MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class EngineSettings:
    """What the engine must know besides the layers."""

    micro_batch_size: int
    num_micro_batches: int
    gradient_clipping: float
    dtype: torch.dtype


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, the same on every rank."""

    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Over all stages, before clipping."""


@dataclass(frozen=True)
class LocalLayer:
    """A layer of this rank's stage."""

    index: int
    layer: PipelineLayer
    module: nn.Module

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameter name within the layer -> parameter; the anchor is none of the network's."""
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and name != _ANCHOR
        }


_ANCHOR = "anchor"


def add_anchor(layer: nn.Module) -> nn.Parameter:
    """Give a frozen layer a parameter that takes part in the output and changes nothing; returns it."""
    anchor = nn.Parameter(torch.zeros(1, device=next(layer.parameters()).device))
    layer.register_parameter(_ANCHOR, anchor)
    layer.register_forward_hook(_add_nothing)
    return anchor


def _add_nothing(layer: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
    return output + layer.get_parameter(_ANCHOR).to(output.dtype) * 0


class _StageSpec(LayerSpec):
    """Builds one layer where the pipeline wants it."""

    def __init__(self, layer: PipelineLayer, prepare: PrepareLayer) -> None:
        super().__init__(nn.Module)
        self._layer, self._prepare = layer, prepare

    def build(self, log: bool = False) -> nn.Module:
        module = self._layer.build()
        self._prepare(self._layer, module)
        return module


class _StagedModule(PipelineModule):
    """A PipelineModule cut at given bounds."""

    def __init__(self, bounds: Sequence[int], **arguments: Any) -> None:
        self._given_bounds = list(bounds)
        super().__init__(**arguments)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._given_bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


class Pipeline:
    """This rank's stage of the network, with its optimizer. Every method is called by all ranks together."""

    def __init__(
        self,
        layers: Sequence[PipelineLayer],
        bounds: Sequence[int],
        settings: EngineSettings,
        *,
        loss: LossFunction,
        prepare: PrepareLayer,
        make_optimizer: MakeOptimizer,
    ) -> None:
        """`prepare` may freeze and change each layer after it is built; `loss` takes the last layer's output and the
        micro-batch's target."""
        self._layers = list(layers)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layer table; the start banner has ours
            module = _StagedModule(
                bounds,
                layers=[_StageSpec(layer, prepare) for layer in layers],
                num_stages=len(bounds) - 1,
                loss_fn=loss,
            )
            self._bounds = (bounds[module.stage_id], bounds[module.stage_id + 1])
            self._module = module
            parameters = self._trainable_or_anchor()
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=make_optimizer(parameters), config=_deepspeed_config(settings)
            )
        _use_exact_norm(self._engine, settings.gradient_clipping)

    def _trainable_or_anchor(self) -> list[nn.Parameter]:
        """What this stage's optimizer gets; marked so that DeepSpeed counts every stage in the gradient norm."""
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if not parameters:
            parameters = [add_anchor(self.local_layers()[-1].module)]
        for parameter in parameters:
            parameter.model_parallel = True
        return parameters

    @property
    def stage(self) -> int:
        return int(self._engine.stage_id)

    @property
    def num_stages(self) -> int:
        return int(self._engine.num_stages)

    @property
    def replica(self) -> int:
        return int(self._engine.grid.get_data_parallel_id())

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def local_layers(self) -> list[LocalLayer]:
        """This rank's layers, in order."""
        start, stop = self._bounds
        modules = self._module.forward_funcs
        return [LocalLayer(index, self._layers[index], modules[index - start]) for index in range(start, stop)]

    def train_step(self, micro_batches: Iterator[MicroBatch], learning_rate: float, ema_decay: float | None) -> StepResult:
        """Forward, backward and one optimizer step over one global batch.

        `ema_decay`: what is left of the average when the new weights go into it, in all steps of a run; None: no average.
        """
        for group in self._engine.optimizer.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.reset_activation_shape()
        loss = self._engine.train_batch(micro_batches)
        if ema_decay is not None:
            update_ema(self._engine.optimizer, ema_decay)
        return StepResult(loss=float(loss), grad_norm=float(self._engine.get_global_grad_norm()))

    def predict(
        self, inputs: Sequence[tuple[Tensor, ...]], skipped_blocks: frozenset[int] = frozenset()
    ) -> list[Tensor] | None:
        """The last layer's output of each micro-batch of equal shape, without gradients; None off the last stage.

        Only the first stage looks at `inputs`, the others at how many there are. `skipped_blocks` are left out this time.
        """
        self._engine.reset_activation_shape()
        self._engine.total_loss = None  # eval_batch adds to what the last training step left
        no_target = torch.empty(0)
        with self._skipping(skipped_blocks):
            outputs = self._engine.eval_batch(
                iter([(entry, no_target) for entry in inputs]),
                compute_loss=False,
                reduce_output=None,
                bcast_loss=False,
                num_micro_batches=len(inputs),
            )
        self._engine.total_loss = None
        self._engine.fwd_outputs = []
        self._engine.reset_activation_shape()
        return outputs if self._engine.is_last_stage() else None

    @contextlib.contextmanager
    def _skipping(self, blocks: frozenset[int]) -> Iterator[None]:
        """Each rank looks after its own layers; nobody else needs to know."""
        chosen = [layer.module for layer in self.local_layers() if layer.layer.block in blocks]
        skipped = [module for module in chosen if isinstance(module, BlockLayer)]
        assert len(skipped) == len(chosen)
        try:
            for module in skipped:
                module.skipped = True
            yield
        finally:
            for module in skipped:
                module.skipped = False

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """While it lasts, the network computes with the weights' average; afterwards, bit for bit with what it had.

        For looking, not for training: in between, no step and no `write_states`. There must be an average, see
        `read_weights`. The weights in use are always the optimizer's float32 ones, rounded, so no copy is kept.
        """
        with torch.no_grad():
            for layer in self.local_layers():
                for parameter in layer.trainable().values():
                    parameter.copy_(read_weights(parameter, ema=True))
        yield
        # Not in a `finally`: ranks wait for each other in it, and where one has failed the others never come.
        self._engine.optimizer.update_lp_params()

    def from_last_stage(self, tensor: Tensor | None, shape: Sequence[int]) -> Tensor:
        """The last stage's float32 tensor, on every rank of this replica."""
        box = torch.empty(tuple(shape), dtype=torch.float32, device=self.device) if tensor is None else tensor.contiguous()
        if self.num_stages > 1:
            source = self._engine.grid.stage_to_global(self.num_stages - 1)
            dist.broadcast(box, src=source, group=self._engine.grid.get_pipe_parallel_group())
        return box

    def read_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Float32 weights and optimizer state of one parameter, on the CPU; all replicas in the same order."""
        return read_state(self._engine.optimizer, parameter)

    def read_weights(self, parameter: nn.Parameter, *, ema: bool = False) -> Tensor:
        """Float32 weights of one parameter, or their average, on the CPU; all replicas in the same order.

        There is an average once a step was made with `ema_decay`, or a checkpoint of such a run was loaded.
        """
        return read_weights(parameter, ema=ema).cpu()

    def write_states(self, states: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        """Set what `read_state` gave, for every trainable parameter of this rank."""
        if states:
            write_states(self._engine.optimizer, states)


def _deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.num_micro_batches,
        "gradient_clipping": settings.gradient_clipping,
        "steps_per_print": None,
        # Under ZeRO-1 alone does DeepSpeed count every stage's gradients in the norm.
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    if settings.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        # Else the accumulated gradients are rounded to bfloat16 on their way between replicas, even if there is one.
        config["communication_data_type"] = "fp32"
    return config


def _use_exact_norm(engine: Any, max_norm: float) -> None:
    """Clip by squares summed in float64 over parameters, replicas and stages, and rounded once at the end.

    DeepSpeed rounds each stage's sum to float32 first, so its norm, and with clipping the run, would depend on the stages.
    """
    optimizer = engine.optimizer
    assert len(flat_partitions(optimizer)) == 1
    if isinstance(optimizer, BF16_Optimizer):
        _clip_before_step(optimizer, max_norm, engine.grid.get_pipe_parallel_group())
    else:
        _replace_norm(optimizer)


def _exact_norm(gradients: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    """The norm over the gradients of every rank in the group (None: all ranks), a float32 scalar."""
    squares = [gradient.double().square().sum() for gradient in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total.sqrt().float()


def _replace_norm(optimizer: Any) -> None:
    """Of the float32 optimizer, whose gradients are cut over the replicas: the norm it clips by."""

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        own = [part for part in optimizer.averaged_gradients[0] if not getattr(part, "_zero_padding", False)]
        return _exact_norm(own, optimizer.single_partition_of_fp32_groups[0].device, None)

    optimizer.scaled_global_norm = scaled_global_norm


def _clip_before_step(optimizer: Any, max_norm: float, pipe_group: dist.ProcessGroup) -> None:
    """Of the bfloat16 optimizer, where each replica has whole float32 gradients: clip them ourselves, then let it step."""
    deepspeeds_step = optimizer.step
    optimizer.clip_grad = 0.0

    def step(closure: None = None) -> None:
        gradients = optimizer.get_grads_for_norm(for_clipping=True)
        norm = _exact_norm(gradients, optimizer.fp32_groups_flat_partition[0].device, pipe_group)
        if max_norm > 0:
            share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(share)
        deepspeeds_step()
        optimizer._global_grad_norm = norm

    optimizer.step = step
