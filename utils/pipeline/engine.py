"""Training the network over all processes with DeepSpeed's pipeline engine.

What this package adds to the engine, and why (DeepSpeed 0.19.8):
* each rank builds and reads the layers of its own stage only (stage.py), cut where partition.py says;
* a stage in which nothing is trained gets an anchor, a parameter that is multiplied by zero;
* the norm that clips has the same bits on any number of stages (gradient_norm.py);
* the engine's record of activation shapes is reset before every step, because steps differ in resolution.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

import utils.distributed.library_settings  # noqa: F401  before DeepSpeed, which reads the environment when it is imported
from models.streams import Sample, SampleShape
from utils.pipeline.gradient_norm import use_exact_norm
from utils.pipeline.optimizer_state import (
    link_states,
    read_state,
    read_weights,
    restore_groups,
    update_ema,
    write_states,
)
from utils.pipeline.stage import LocalLayer, MicroBatch, PrepareLayer, Stage, StagePlan
from utils.trainable.base import ParameterGroup

LossFunction = Callable[[Tensor, tuple[Tensor, ...], SampleShape], Tensor]
"""(output of the last layer, target of the micro-batch, its shape) -> loss."""
MakeGroups = Callable[[Mapping[str, nn.Parameter]], list[ParameterGroup]]
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""torch's dictionaries of parameter groups -> optimizer."""


@dataclass(frozen=True)
class EngineSettings:
    """What the engine must know besides the layers."""

    micro_batch_size: int
    num_micro_batches: int
    gradient_clipping: float
    """Largest norm of the gradients; 0: no clipping."""
    dtype: torch.dtype


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one optimizer step, identical on every rank."""

    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Over all stages, before clipping."""


class _StageSpec(LayerSpec):
    """One stage, which DeepSpeed takes for a layer and builds on the stage's ranks only."""

    def __init__(self, plan: StagePlan, index: int, prepare: PrepareLayer) -> None:
        super().__init__(nn.Module)
        self._plan, self._index, self._prepare = plan, index, prepare

    def build(self, log: bool = False) -> nn.Module:
        return Stage(self._plan, self._index, self._prepare)


class Pipeline:
    """This rank's stage of the network, with its optimizer. Every method is called by all ranks together."""

    def __init__(
        self,
        plan: StagePlan,
        settings: EngineSettings,
        *,
        loss: LossFunction,
        prepare: PrepareLayer,
        groups: MakeGroups,
        make_optimizer: MakeOptimizer,
    ) -> None:
        """`prepare` may freeze and change each layer after it is built; `groups` sorts a stage's trainable parameters."""
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints a layer table; the start banner has ours
            module = PipelineModule(
                layers=[_StageSpec(plan, index, prepare) for index in range(plan.num_stages)],
                num_stages=plan.num_stages,
                partition_method="uniform",
                loss_fn=lambda output, target: loss(output, target, self._stage.current_shape),
            )
            (stage,) = module.forward_funcs
            assert isinstance(stage, Stage)
            self._stage: Stage = stage
            trainable = stage.named_trainable()
            self.groups = groups(trainable) if trainable else []
            """The parameter groups of this stage; other stages may have others."""
            _check_groups(self.groups, trainable)
            optimizer = make_optimizer(self._optimizer_groups())
            torch_groups = optimizer.param_groups
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=_deepspeed_config(settings))
        restore_groups(self._engine.optimizer, torch_groups)
        self._states_are_linked = False
        use_exact_norm(self._engine, settings.gradient_clipping)

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        """The groups as the optimizer takes them; the anchor's where there are none."""
        entries: list[dict[str, Any]] = []
        for group in self.groups:
            decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
            entries.append({"params": list(group.parameters.values()), "lr": group.schedule.peak, **decay})
        entries = entries or [{"params": [self._stage.add_anchor()]}]
        for parameter in (parameter for entry in entries for parameter in entry["params"]):
            parameter.model_parallel = True  # else DeepSpeed leaves all stages but the first out of the gradient norm
        return entries

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
        return self._stage.layers

    # --- training and prediction -------------------------------------------------------------------------------------

    def train_step(
        self,
        micro_batches: Iterable[MicroBatch],
        shapes: Sequence[SampleShape],
        learning_rates: Mapping[str, float],
        ema_decay: float | None,
    ) -> StepResult:
        """Forward, backward and one optimizer step over one global batch.

        `shapes`: one for each micro-batch of this replica, on every stage. `learning_rates`: by group name, for the groups
        of this stage at least. `ema_decay`: the fraction of the average that is kept when the new weights are added, given
        in all steps of a run or in none; None: no average is kept.
        """
        if self.groups:
            for group, entry in zip(self.groups, self._engine.optimizer.optimizer.param_groups, strict=True):
                entry["lr"] = learning_rates[group.name]
        self._engine.reset_activation_shape()
        pairs = zip(micro_batches, shapes, strict=False)  # lazily: micro-batches are prepared while earlier ones are used
        with self._stage.expecting(shapes):
            loss = self._engine.train_batch((self._stage.input_tuple(one.sample, shape), one.target) for one, shape in pairs)
        if not self._states_are_linked:
            link_states(self._engine.optimizer)
            self._states_are_linked = True
        if ema_decay is not None:
            update_ema(self._engine.optimizer, ema_decay)
        return StepResult(loss=float(loss), grad_norm=float(self._engine.get_global_grad_norm()))

    def predict(
        self,
        shapes: Sequence[SampleShape],
        samples: Iterable[Sample],
        skipped_blocks: frozenset[int] = frozenset(),
    ) -> list[Tensor] | None:
        """The last layer's output of each micro-batch, without gradients; None off the last stage.

        `shapes`: of all micro-batches, on every stage; they must be equal. `samples`: one for each shape on the first
        stage, not read on others. `skipped_blocks` are skipped in this pass.
        """
        self._engine.reset_activation_shape()
        self._engine.total_loss = None  # eval_batch adds to what the last training step left
        no_target = torch.empty(0)
        inputs: list[tuple[Tensor, ...]] = [() for _ in shapes]
        if self.stage == 0:
            inputs = [self._stage.input_tuple(sample, shape) for sample, shape in zip(samples, shapes, strict=True)]
        with self._stage.skipping(skipped_blocks), self._stage.expecting(shapes):
            outputs = self._engine.eval_batch(
                iter([(entry, no_target) for entry in inputs]),
                compute_loss=False,
                reduce_output=None,
                bcast_loss=False,
                num_micro_batches=len(shapes),
            )
        self._engine.total_loss = None
        self._engine.fwd_outputs = []
        self._engine.reset_activation_shape()
        return outputs if self._engine.is_last_stage() else None

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it, the network computes with the average of the weights; afterwards with the same weights as before.

        For evaluation and previews: no training step and no `write_states` within it. An average must exist, see
        `read_weights`. The working weights are always the optimizer's float32 weights, rounded, so no copy is kept.
        """
        with torch.no_grad():
            for layer in self.local_layers():
                for parameter in layer.trainable().values():
                    parameter.copy_(read_weights(parameter, ema=True))
        yield
        # Not in a `finally`: ranks wait for each other here, and where one has failed the others would wait for ever.
        self._engine.optimizer.update_lp_params()

    def from_last_stage(self, tensor: Tensor | None, shape: Sequence[int]) -> Tensor:
        """The last stage's float32 tensor of this shape, on every rank of this replica."""
        buffer = (
            torch.empty(tuple(shape), dtype=torch.float32, device=self.device) if tensor is None else tensor.contiguous()
        )
        if self.num_stages > 1:
            source = self._engine.grid.stage_to_global(self.num_stages - 1)
            dist.broadcast(buffer, src=source, group=self._engine.grid.get_pipe_parallel_group())
        return buffer

    # --- training state ----------------------------------------------------------------------------------------------

    def read_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Float32 weights and optimizer state of one parameter, on the CPU; all replicas in the same order."""
        return read_state(self._engine.optimizer, parameter)

    def read_weights(self, parameter: nn.Parameter, *, ema: bool = False) -> Tensor:
        """Float32 weights of one parameter, or their average, on the CPU; all replicas in the same order.

        An average exists after a step with `ema_decay`, or once a checkpoint of such a run was loaded.
        """
        return read_weights(parameter, ema=ema).cpu()

    def write_states(self, states: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        """Sets what `read_state` returned, for every trainable parameter of this rank; of `master` alone, for any."""
        if states:
            write_states(self._engine.optimizer, states)


def _check_groups(groups: Sequence[ParameterGroup], trainable: Mapping[str, nn.Parameter]) -> None:
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(trainable), "the groups must hold each trainable parameter exactly once"
    assert all(group.parameters for group in groups), "a group without parameters"
    assert len({group.name for group in groups}) == len(groups), "two groups of one name"


def _deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.num_micro_batches,
        "gradient_clipping": settings.gradient_clipping,
        "steps_per_print": None,
        # The only mode with correct norms on several stages, and with optimizer state that can be read by parameter.
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    if settings.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        # Else accumulated gradients are rounded to bfloat16 when they are sent between replicas, even with one replica.
        config["communication_data_type"] = "fp32"
    return config
