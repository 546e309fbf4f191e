"""What a stage does at each instruction of DeepSpeed's pipeline schedule: load, forward, backward, send, receive.

DeepSpeed 0.19.8 decides the order of the instructions (one forward, one backward in turn) and sends tensors between stages.
Its own instructions announce every tensor's shape to the next stage, copy activations twice, round gradients to the
activations' dtype when they divide by the number of micro-batches, and run backward through stages where nothing is
trained. Here every stage knows all shapes from (seed, step), and gradients are sent only to stages that need them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

import utils.distributed.library_settings  # noqa: F401  before DeepSpeed, which reads the environment when it is imported
from models.streams import SampleShape
from utils.pipeline.stage import MicroBatch, Stage

LossFunction = Callable[[Tensor, tuple[Tensor, ...], SampleShape], Tensor]
"""(output of the last layer, target of the micro-batch, its shape) -> loss, a scalar."""


@dataclass(frozen=True)
class Position:
    """Where a stage is in the pipeline, and what is trained there."""

    stage: int
    num_stages: int
    num_micro_batches: int
    """The micro-batches of a training step on each replica."""
    is_trained_before: bool
    """Whether a stage before this one is trained, and so needs the gradient of what it sent."""
    is_trained_until_here: bool
    """Whether this stage or one before it is trained."""

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def num_in_flight(self) -> int:
        """The most micro-batches whose activations the stage keeps at once."""
        return min(self.num_micro_batches, self.num_stages - self.stage)


@dataclass
class InFlight:
    """A micro-batch between its load or arrival at this stage and the end of its backward pass."""

    shape: SampleShape
    inputs: Any = None
    """Streams on the first stage; on others the packed tensor that was received."""
    output: Tensor | None = None
    """The packed tensor that is sent on; the loss on the last stage."""
    gradient: Tensor | None = None
    """The gradient of `output`, as the next stage sent it."""


@dataclass
class Instructions:
    """The instructions of one stage. Each takes the number of a buffer, in which one micro-batch at a time is in flight."""

    stage: Stage
    loss: LossFunction
    position: Position
    device: torch.device
    before_last_backward: Callable[[], None] = lambda: None
    """Called in each training step before the backward pass of the last micro-batch."""
    losses: list[Tensor] = field(default_factory=list)
    """The losses of the training step so far; on the last stage."""
    outputs: list[Tensor] = field(default_factory=list)
    """The outputs of the prediction so far; on the last stage."""
    _in_flight: dict[int, InFlight] = field(default_factory=dict)
    _targets: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """By buffer: a target is loaded after the activation has arrived in training, and before in prediction."""
    _shapes: deque[SampleShape] = field(default_factory=deque)
    _batches: Iterator[MicroBatch] = iter(())
    _num_backward: int = 0

    def begin(self, batches: Iterable[MicroBatch], shapes: Sequence[SampleShape]) -> None:
        """Prepares a pass over micro-batches of these shapes. `batches` is read on the first and on the last stage only."""
        self._batches, self._shapes = iter(batches), deque(shapes)
        self.losses, self.outputs, self._num_backward = [], [], 0
        self._in_flight.clear()

    def end(self) -> None:
        """Releases what the pass has left. Asserts that every micro-batch has passed."""
        assert not self._shapes, f"{len(self._shapes)} micro-batches were not forwarded"
        self._in_flight.clear()
        self._targets.clear()
        self._batches = iter(())

    # --- forward -----------------------------------------------------------------------------------------------------

    def load(self, buffer_id: int) -> None:
        """On the first stage: takes the next sample. On the last one: its target."""
        batch = next(self._batches)
        if self.position.is_first:
            flight = self._in_flight[buffer_id] = InFlight(self._shapes.popleft())
            assert batch.sample is not None
            self.stage.check_sample(batch.sample, flight.shape)
            flight.inputs = {name: self._moved(tensor) for name, tensor in batch.sample.tensors.items()}
        if self.position.is_last:
            self._targets[buffer_id] = tuple(self._moved(tensor) for tensor in batch.target)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def receive_activation(self, buffer_id: int) -> None:
        shape = self._shapes.popleft()
        received = torch.empty(self.stage.received_size(shape), dtype=self.stage.dtype, device=self.device)
        p2p.recv(received, self.position.stage - 1)
        received.requires_grad_(self.position.is_trained_before and torch.is_grad_enabled())
        self._in_flight[buffer_id] = InFlight(shape, received)

    def forward(self, buffer_id: int) -> None:
        flight = self._in_flight[buffer_id]
        output = self.stage(flight.inputs, flight.shape)
        if not self.position.is_last:
            flight.output = output
        elif torch.is_grad_enabled():
            flight.output = self.loss(output, self._targets.pop(buffer_id), flight.shape)
            self.losses.append(flight.output.detach())
        else:
            self.outputs.append(output)

    def send_activation(self, buffer_id: int) -> None:
        output = self._in_flight[buffer_id].output
        assert output is not None
        p2p.send(output.detach(), self.position.stage + 1)

    # --- backward ----------------------------------------------------------------------------------------------------

    def receive_gradient(self, buffer_id: int) -> None:
        flight = self._in_flight[buffer_id]
        assert flight.output is not None
        if self.position.is_trained_until_here:
            flight.gradient = torch.empty_like(flight.output)
            p2p.recv(flight.gradient, self.position.stage + 1)

    def backward(self, buffer_id: int) -> None:
        """The gradients are those of the mean loss over the step's micro-batches."""
        flight = self._in_flight[buffer_id]
        assert flight.output is not None
        self._num_backward += 1
        if self._num_backward == self.position.num_micro_batches:
            self.before_last_backward()
        if flight.output.requires_grad:  # not so where nothing up to here is trained
            if self.position.is_last:
                (flight.output / self.position.num_micro_batches).backward()
            else:
                flight.output.backward(flight.gradient)
        flight.output = flight.gradient = None
        if not self.position.is_trained_before:
            flight.inputs = None

    def send_gradient(self, buffer_id: int) -> None:
        received = self._in_flight.pop(buffer_id).inputs
        if self.position.is_trained_before:
            unused = received.grad is None
            p2p.send(torch.zeros_like(received) if unused else received.grad.contiguous(), self.position.stage - 1)


class ScheduleEngine(PipelineEngine):
    """DeepSpeed's engine, which runs `instructions` in the order of its schedules.

    Made of a PipelineEngine by assigning to its `__class__`, because only `deepspeed.initialize` can construct one.
    """

    instructions: Instructions

    def run(self, micro_batches: Iterable[MicroBatch], shapes: Sequence[SampleShape]) -> list[Tensor]:
        """Forward and backward passes of a training step; returns the micro-batches' losses on the last stage."""
        self._set_mode(training=True)
        self.instructions.begin(micro_batches, shapes)
        self._exec_schedule(self._train_schedule())
        self.instructions.end()
        return self.instructions.losses

    def _set_mode(self, *, training: bool) -> None:
        """As `train` and `eval` of the module, which call every part of it, if it is in the other mode."""
        if self.module.training != training:
            self.module.train(training)

    def predict(self, micro_batches: Iterable[MicroBatch], shapes: Sequence[SampleShape]) -> list[Tensor]:
        """Forward passes without gradients; returns the outputs on the last stage."""
        self._set_mode(training=False)
        self.instructions.begin(micro_batches, shapes)
        with torch.no_grad():
            self._exec_schedule(self._inference_schedule(len(shapes)))
        self.instructions.end()
        return self.instructions.outputs


def _instruction(name: str) -> Callable[..., None]:
    def run(engine: ScheduleEngine, buffer_id: int) -> None:
        getattr(engine.instructions, name)(buffer_id)

    return run


def _nothing(_engine: ScheduleEngine) -> None:
    """The optimizer step follows the schedule, see optimizer_step.py; no weights are shared between stages."""


# DeepSpeed looks instructions up here and not by the names of methods.
ScheduleEngine._INSTRUCTION_MAP = {
    schedule.LoadMicroBatch: _instruction("load"),
    schedule.RecvActivation: _instruction("receive_activation"),
    schedule.ForwardPass: _instruction("forward"),
    schedule.SendActivation: _instruction("send_activation"),
    schedule.RecvGrad: _instruction("receive_gradient"),
    schedule.BackwardPass: _instruction("backward"),
    schedule.SendGrad: _instruction("send_gradient"),
    schedule.ReduceTiedGrads: _nothing,
    schedule.ReduceGrads: _nothing,
    schedule.OptimizerStep: _nothing,
}
