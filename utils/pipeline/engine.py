"""Training the network over all processes: DeepSpeed's pipeline schedule with this program's own optimizer step.

Each rank builds and reads the layers of its own stage only (stage.py). DeepSpeed 0.19.8 divides the processes into stages
and replicas and orders the passes of the micro-batches (instructions.py); the optimizer step follows (optimizer_step.py).
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

import utils.distributed.library_settings  # noqa: F401  before DeepSpeed, which reads the environment when it is imported
from models.streams import Sample, SampleShape, Streams
from utils.config.schema.optimizer import MasterKind
from utils.distributed import group
from utils.pipeline.instructions import Instructions, LossFunction, Position, ScheduleEngine
from utils.pipeline.optimizer_step import MakeOptimizer, Network, OptimizerStep, StepReport, StepSettings
from utils.pipeline.recompute import KeptBytes, Recompute, least_recompute
from utils.pipeline.replicas import Replicas
from utils.pipeline.stage import LocalLayer, MicroBatch, PrepareLayer, Stage, StagePlan
from utils.trainable.base import ParameterGroup

MakeGroups = Callable[[Mapping[str, nn.Parameter]], list[ParameterGroup]]


@dataclass(frozen=True)
class EngineSettings:
    """What the engine must know besides the layers."""

    micro_batch_size: int
    num_micro_batches: int
    gradient_clipping: float
    """Largest norm of the gradients; 0: no clipping."""
    dtype: torch.dtype
    num_optimizer_sums: int = 0
    """Sums over all parameters that a step of the optimizer needs, see optim/prodigy.py."""
    is_separable: bool = False
    """Whether the optimizer may update some parameters in one call and others in another."""
    master: MasterKind = "float32"
    """How float32 weights are kept beside bfloat16 ones, see masters.py."""
    step_in_backward: bool = False
    """Update each parameter as soon as its gradient is there; for one process, one micro-batch, no clipping."""
    seed: int = 0
    """The seed of stochastic rounding."""


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one optimizer step, identical on every rank."""

    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Over all stages, before clipping."""
    bad_parameter: str | None = None
    """The parameter in whose gradient the first non-finite number arose, if any did."""


class _StageSpec(LayerSpec):
    """One stage, which DeepSpeed takes for a layer and builds on the stage's ranks only."""

    def __init__(self, plan: StagePlan, index: int, prepare: PrepareLayer, dtype: torch.dtype) -> None:
        super().__init__(nn.Module)
        self._arguments = (plan, index, prepare, dtype)

    def build(self, log: bool = False) -> nn.Module:
        return Stage(*self._arguments)


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
        before = _process_groups()
        self._engine = _start_engine(plan, settings, prepare)
        self._process_groups = _process_groups() - before
        """Those that DeepSpeed has made for this pipeline, with threads of their own."""
        (stage,) = self._engine.module.forward_funcs
        assert isinstance(stage, Stage)
        self._stage: Stage = stage
        trainable = stage.named_trainable()
        self.groups = groups(trainable) if trainable else []
        """The parameter groups of this stage; other stages may have others."""
        _check_groups(self.groups, trainable)
        names = dict(group.gather((self.stage, list(trainable))))
        names_before = [name for index in range(self.stage) for name in names[index]]
        stage.set_trained_before(names_before)
        position = Position(
            stage=self.stage,
            num_stages=self.num_stages,
            num_micro_batches=settings.num_micro_batches,
            is_trained_before=bool(names_before),
            is_trained_until_here=bool(names_before or trainable),
        )
        self._engine.instructions = Instructions(stage, loss, position, self.device)
        grid = self._engine.grid
        self._replicas = Replicas(list(grid.dp_group), self.replica, grid.get_data_parallel_group())
        self._optimizer_step = OptimizerStep(
            self.groups,
            Network(
                [name for index in range(self.num_stages) for name in names[index]],
                num_losses=settings.num_micro_batches * self._replicas.count,
                num_sums=settings.num_optimizer_sums,
            ),
            self._replicas,
            make_optimizer=make_optimizer,
            settings=StepSettings(
                max_norm=settings.gradient_clipping,
                master=settings.master,
                seed=settings.seed,
                is_separable=settings.is_separable,
                in_backward=settings.step_in_backward,
            ),
            device=self.device,
        )
        self._engine.instructions.before_last_backward = self._optimizer_step.begin_last_micro_batch

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

    def close(self) -> None:
        """Frees the memory of weights, gradients and optimizer state. Nothing can be done with the pipeline afterwards.

        The process groups are ended as well. All ranks together.
        DeepSpeed's engine is part of reference cycles, and module-level variables of DeepSpeed refer to its last module.
        """
        self._optimizer_step.close()
        for tensor in (*self._stage.parameters(), *self._stage.buffers()):
            tensor.grad = None
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        self._engine.instructions.begin((), ())
        self._engine.destroy()
        del self._engine
        gc.collect()
        for process_group in self._process_groups:
            dist.destroy_process_group(process_group)

    # --- training and prediction -------------------------------------------------------------------------------------

    def train_step(
        self,
        micro_batches: Iterable[MicroBatch],
        shapes: Sequence[SampleShape],
        learning_rates: Mapping[str, float],
        ema_decay: float | None,
        *,
        step: int,
    ) -> StepResult:
        """Forward, backward and optimizer step number `step`, counted from 0, over one global batch.

        `shapes`: one for each micro-batch of this replica, on every stage; they may differ. `learning_rates`: by group name,
        for the groups of this stage at least. `ema_decay`: the fraction of the average that is kept when the new weights are
        added, given in all steps of a run or in none; None: no average is kept. A step with a loss or gradient that is not
        finite changes nothing.
        """
        self._optimizer_step.begin(step, learning_rates)
        report = self._optimizer_step.run(self._engine.run(micro_batches, shapes))
        if ema_decay is not None and report.is_finite:
            self._optimizer_step.update_averages(ema_decay)
        return StepResult(_mean_loss(report, self._replicas.count), report.grad_norm, report.bad_parameter)

    def predict(
        self,
        shapes: Sequence[SampleShape],
        samples: Iterable[Sample],
        skipped_blocks: frozenset[int] = frozenset(),
    ) -> list[Tensor] | None:
        """The last layer's output of each micro-batch, without gradients; None off the last stage.

        `shapes`: of all micro-batches, on every stage. `samples`: one for each shape on the first stage, not read on others.
        `skipped_blocks` are skipped in this pass.
        """
        if self.stage == 0:
            batches = [MicroBatch(sample, ()) for sample, _ in zip(samples, shapes, strict=True)]
        else:
            batches = [MicroBatch(None, ()) for _ in shapes]
        with self._stage.skipping(skipped_blocks):
            outputs = self._engine.predict(batches, shapes)
        return outputs if self.stage == self.num_stages - 1 else None

    def fit_recompute(self, sample: Sample, free: int) -> Recompute | None:
        """Chooses the fastest recompute mode of this stage whose activations fit into `free` bytes; None if none does.

        `sample`: a micro-batch of the largest shape, of any values; off the first stage only its shape is read. If nothing
        fits, all activations are recomputed.
        """
        kept = self.measure_blocks(sample)
        chosen = least_recompute(kept, self._engine.instructions.position.num_in_flight, free)
        self._stage.set_recompute(chosen or Recompute("all", len(kept)))
        return chosen

    def measure_blocks(self, sample: Sample) -> list[KeptBytes]:
        """What each block of this stage keeps of such a micro-batch, in each recompute mode; none is set afterwards."""
        if self.stage == 0:
            inputs: Streams | Tensor = {name: tensor.to(self.device) for name, tensor in sample.tensors.items()}
        else:
            size = self._stage.received_size(sample.shape)
            inputs = torch.zeros(size, dtype=self._stage.dtype, device=self.device)
            inputs.requires_grad_(self._engine.instructions.position.is_trained_before)
        return self._stage.measure_blocks(inputs, sample.shape)

    @property
    def num_trained(self) -> int:
        """Weights of this stage that are trained, counted in elements."""
        return sum(weight.numel() for group in self.groups for weight in group.parameters.values())

    @property
    def num_owned(self) -> int:
        """Those of them that this replica updates."""
        return self._optimizer_step.num_owned

    def evaluated_weights(self, *, ema: bool) -> contextlib.AbstractContextManager[None]:
        """Within it, the network computes with the weights of `read_weights`; afterwards with the same weights as before.

        For evaluation and previews: no training step, and no writing of states.
        """
        return self._optimizer_step.evaluated_weights(ema=ema)

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
        """Float32 weights, average and optimizer state of one parameter, on the CPU; all replicas in the same order."""
        return self._optimizer_step.read_state(parameter)

    def read_weights(self, parameter: nn.Parameter, *, ema: bool = False) -> Tensor:
        """Float32 weights of one parameter to evaluate and export, on the CPU; all replicas in the same order.

        They are those of the last step, or the average where a schedule-free optimizer trains. `ema`: their moving average.

        The latter exists after a step with `ema_decay`, or once a checkpoint of such a run was loaded.
        """
        return self._optimizer_step.read_weights(parameter, ema=ema)

    def write_states(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Sets what `read_state` returned, for any of this rank's trainable parameters; of `master` alone, the weights."""
        self._optimizer_step.write_states(states)


def _start_engine(plan: StagePlan, settings: EngineSettings, prepare: PrepareLayer) -> ScheduleEngine:
    """Builds this rank's stage and DeepSpeed's engine around it, with an optimizer of DeepSpeed's that has nothing to do."""
    idle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    config = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.num_micro_batches,
        "steps_per_print": None,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints a layer table; the start banner has ours
        module = PipelineModule(
            layers=[_StageSpec(plan, index, prepare, settings.dtype) for index in range(plan.num_stages)],
            num_stages=plan.num_stages,
            partition_method="uniform",
        )
        engine, *_ = deepspeed.initialize(model=module, optimizer=idle, config=config)
    engine.__class__ = ScheduleEngine
    assert isinstance(engine, ScheduleEngine)
    return engine


def _process_groups() -> set[dist.ProcessGroup]:
    """The process groups of this process."""
    return set(dist.distributed_c10d._world.pg_map)


def _mean_loss(report: StepReport, num_replicas: int) -> float:
    """The mean over the micro-batches, then over the replicas, summed in float32 and in order."""
    losses = torch.tensor(report.losses).view(num_replicas, -1)
    totals = [sum(losses[replica], torch.zeros(())) / losses.shape[1] for replica in range(num_replicas)]
    return float(sum(totals, torch.zeros(())) / num_replicas)


def _check_groups(groups: Sequence[ParameterGroup], trainable: Mapping[str, nn.Parameter]) -> None:
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(trainable), "the groups must hold each trainable parameter exactly once"
    assert all(group.parameters for group in groups), "a group without parameters"
    assert len({group.name for group in groups}) == len(groups), "two groups of one name"
