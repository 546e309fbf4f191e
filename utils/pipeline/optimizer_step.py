"""The optimizer step over whole parameters: float32 gradient sums, exact norm, clipping, update, exchange between replicas.

Gradients are summed in float32 as backward produces them. After the last micro-batch each replica of a stage receives the
mean gradients of the parameters it owns (ownership.py), updates them, and sends the new weights to the other replicas.
Nothing is changed by a step whose loss or gradient norm is not finite.

Needs torch.distributed, but not DeepSpeed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.config.schema.optimizer import MasterKind
from utils.optim.schedule_free import evaluation_weights
from utils.optim.state_tensors import from_tensors, to_tensors
from utils.pipeline.masters import close_all, make_master, open_all, round_weights
from utils.pipeline.ownership import assign_owners, make_buckets
from utils.pipeline.replicas import GradientExchange, Members, Replicas, TrainedParameter
from utils.trainable.base import ParameterGroup

MakeOptimizer = Callable[[list[dict[str, Any]]], Any]
"""torch's dictionaries of parameter groups, each with the parameters' "names" and the group's "name" -> optimizer."""

MASTER = "master"
"""Name of the float32 weights in a parameter's state, beside the optimizer's own states."""
EMA = "ema"
"""Name of the average of the float32 weights over the steps in a parameter's state."""
GROUP_NUMBER = "group."
"""Beginning of the names of numbers that an optimizer keeps for a whole group; each parameter's state has a copy."""
MAX_OPEN_ELEMENTS = 2**25
"""The most float32 weights that are made at once where they are not kept: 128 MiB, and as much to round them."""
CPU_OPEN_ELEMENTS = 2**20
"""The same on a CPU: 4 MiB, which stay in its cache. An update then takes a third of the time that it takes with 128 MiB."""
_LOST = (
    "a gradient of {} was not finite, and optimizer.step_in_backward had updated weights before that was known; resume from "
    "the last checkpoint"
)


@dataclass(frozen=True)
class Network:
    """What every rank knows of the whole network's training."""

    parameter_names: Sequence[str]
    """Native names of the trained parameters of all stages, in the network's order."""
    num_losses: int
    """Micro-batches of all replicas together."""
    num_sums: int = 0
    """Sums over all parameters of all stages that the optimizer needs in each step."""


@dataclass(frozen=True)
class StepSettings:
    """How the optimizer step is done."""

    max_norm: float = 0.0
    """Largest norm of the gradients; 0: no clipping."""
    master: MasterKind = "float32"
    seed: int = 0
    """The seed of stochastic rounding."""
    is_separable: bool = False
    """Whether the optimizer may update some parameters in one call and others in another."""
    in_backward: bool = False
    """Update each parameter as soon as its gradient is there."""


@dataclass(frozen=True)
class StepReport:
    """What all ranks agree on after a step."""

    losses: Sequence[float]
    """The float32 loss of each micro-batch: those of the first replica in their order, then those of the next."""
    grad_norm: float
    """Over all stages, before clipping; a float32 number."""
    bad_parameter: str | None
    """The parameter in whose gradient the first non-finite number arose, if any did."""

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are finite; else the step has changed nothing."""
        return all(map(math.isfinite, (self.grad_norm, *self.losses)))


class OptimizerStep:
    """The trained parameters of this stage and the optimizer of those that this replica owns."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        network: Network,
        replicas: Replicas,
        *,
        make_optimizer: MakeOptimizer,
        settings: StepSettings,
        device: torch.device,
    ) -> None:
        """`groups` of the stage's parameters."""
        self._network, self._replicas, self._settings, self._device = network, replicas, settings, device
        weights = {name: weight for group in groups for name, weight in group.parameters.items()}
        names = [name for name in network.parameter_names if name in weights]
        sizes = [weights[name].numel() for name in names]
        owners = assign_owners(sizes, replicas.count)
        positions = {name: index for index, name in enumerate(network.parameter_names)}
        self._parameters = [
            TrainedParameter(name, positions[name], weights[name], owner) for name, owner in zip(names, owners, strict=True)
        ]
        self._of_weight = {parameter.weight: parameter for parameter in self._parameters}
        self._owned = [parameter for parameter in self._parameters if parameter.owner == replicas.index]
        for parameter in self._owned:
            parameter.master = make_master(settings.master, parameter.weight, parameter.name, settings.seed)
        # Each call holds up the launch of the backward pass: only where one is needed. `Tensor.grad_dtype` would sum in
        # float32 without, but does not round the gradients of RMS norms to bfloat16 first, and so changes the last bits.
        self._hooks = [
            one.weight.register_post_accumulate_grad_hook(partial(self._on_gradient, one))
            for one in self._parameters
            if one.weight.dtype != torch.float32 or replicas.count > 1 or settings.in_backward
        ]
        buckets = make_buckets(sizes, owners) if replicas.count > 1 else []
        self._exchange = GradientExchange(
            [Members(bucket.owner, [self._parameters[member] for member in bucket.members]) for bucket in buckets], replicas
        )
        self._is_last = False
        """Whether the backward pass of the last micro-batch has begun."""
        self._step = 0
        self._updated: dict[TrainedParameter, Tensor] = {}
        """Parameters that were updated during the backward pass, and the norms of their gradients."""
        self._slots = torch.tensor([parameter.index for parameter in self._owned], dtype=torch.long, device=device)
        entries = [entry for entry in map(self._entry, groups) if entry["params"]]
        self._optimizer = make_optimizer(entries) if entries else None
        self._first_numbers = [_numbers(entry) for entry in self._torch_groups]
        groups_of_masters = enumerate(self._torch_groups)
        self._group_of = {master: index for index, entry in groups_of_masters for master in entry["params"]}
        """Float32 weights -> index of their torch parameter group."""
        self._is_schedule_free = self._is_anywhere(any("train_mode" in entry for entry in self._torch_groups))
        self._kept: dict[TrainedParameter, Tensor] = {}
        """Working weights in whose place others are evaluated, where the float32 weights need them."""

    @property
    def num_owned(self) -> int:
        """Weights that this replica updates, counted in elements."""
        return sum(parameter.weight.numel() for parameter in self._owned)

    def _entry(self, group: ParameterGroup) -> dict[str, Any]:
        """The group as torch's optimizers take it: of the parameters that this replica owns."""
        own = [self._of_weight[weight] for weight in group.parameters.values()]
        own = [parameter for parameter in own if parameter.master is not None]
        decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        names, masters = [parameter.name for parameter in own], [parameter.owned.parameter for parameter in own]
        return {"name": group.name, "params": masters, "names": names, "lr": group.schedule.peak, **decay}

    @property
    def _torch_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups if self._optimizer is not None else []

    # --- a step ------------------------------------------------------------------------------------------------------

    def begin(self, step: int, rates: Mapping[str, float]) -> None:
        """Begins optimizer step number `step`, counted from 0, with the learning rate of each group, given by name."""
        self._step = step
        for entry in self._torch_groups:
            entry["lr"] = rates[entry["name"]]

    def begin_last_micro_batch(self) -> None:
        """Says that the next backward pass is the last of the step: gradients are complete once it has computed them."""
        self._is_last = True

    def _on_gradient(self, parameter: TrainedParameter, _weight: Tensor) -> None:
        """A hook that runs once backward has added the gradient of a micro-batch."""
        if parameter.weight.dtype != torch.float32:
            parameter.add_gradient()
        if not self._is_last:
            return
        parameter.take_gradient()
        if self._settings.in_backward:
            self._update_early(parameter)
        else:
            self._exchange.add(parameter)

    @torch.no_grad()
    def run(self, losses: Sequence[Tensor]) -> StepReport:
        """Updates the weights from the gradients collected since the last step. All ranks together.

        `losses` of this replica's micro-batches on the last stage, scalars; empty on others.
        """
        for parameter in self._parameters:
            if not self._exchange.has(parameter) and parameter not in self._updated:
                parameter.take_gradient()
        self._exchange.finish()
        report = self._measure(losses)
        if report.is_finite:
            self._update(report.grad_norm)
        elif self._updated:
            raise FloatingPointError(_LOST.format(report.bad_parameter or "the loss"))
        for parameter in self._parameters:
            parameter.gradient = None
        self._updated.clear()
        self._is_last = False
        return report

    def _measure(self, losses: Sequence[Tensor]) -> StepReport:
        """Norm of every parameter's gradient and every loss, in one vector that has a slot for each.

        All slots but those of one rank are zero, so that the sum over the ranks is exact, and the norm has the same bits on
        any number of stages.
        """
        count = len(self._network.parameter_names)
        values = torch.zeros(count + self._network.num_losses, dtype=torch.float64, device=self._device)
        if self._owned:
            values[self._slots] = torch.stack(self._norms())
        if losses:
            start = count + self._replicas.index * len(losses)
            values[start : start + len(losses)] = torch.stack(list(losses)).double()
        dist.all_reduce(values)
        values = values.cpu()
        norms, found = values[:count], values[count:].tolist()
        # A gradient that is not finite makes those of all layers before it so too: it arose in the last of them.
        bad = (~norms.isfinite()).nonzero().flatten().tolist()
        name = self._network.parameter_names[bad[-1]] if bad else None
        return StepReport(found, float(norms.square().sum().sqrt().float()), name)

    def _norms(self) -> list[Tensor]:
        """The norm of the gradient of each owned parameter, float64."""
        rest = [parameter for parameter in self._owned if parameter not in self._updated]
        norms = torch._foreach_norm([one.summed for one in rest], 2, dtype=torch.float64) if rest else ()
        found = {**self._updated, **dict(zip(rest, norms, strict=True))}
        return [found[parameter] for parameter in self._owned]

    def _update(self, grad_norm: float) -> None:
        """Updates the owned parameters that were not updated during the backward pass."""
        rest = [parameter for parameter in self._owned if parameter not in self._updated]
        if self._settings.max_norm > 0 and rest:
            factor = float((self._settings.max_norm / (torch.tensor(grad_norm) + 1e-6)).clamp(max=1.0))
            if factor < 1:
                torch._foreach_mul_([parameter.summed for parameter in rest], factor)
        if self._network.num_sums:
            self._apply(rest, self._step_with_sums)
        elif self._optimizer is not None:
            for part in self._parts(rest):
                with self._limited_to(part):
                    self._apply(part, self._optimizer.step)
        self._exchange.share_weights()

    @torch.no_grad()
    def _update_early(self, parameter: TrainedParameter) -> None:
        """Updates a parameter during the backward pass. No layer needs its weights after its gradient was computed."""
        assert self._optimizer is not None
        self._updated[parameter] = torch.linalg.vector_norm(parameter.summed, dtype=torch.float64)
        with self._limited_to([parameter]):
            self._apply([parameter], self._optimizer.step)

    def _apply(self, parameters: Sequence[TrainedParameter], step: Callable[[], Any]) -> None:
        """Calls an optimizer's step for these parameters, then releases their gradients."""
        open_all([parameter.owned for parameter in parameters])
        for parameter in parameters:
            parameter.owned.parameter.grad, parameter.gradient = parameter.gradient, None
        step()
        for parameter in parameters:
            parameter.owned.parameter.grad = None
        close_all([parameter.owned for parameter in parameters], self._step)

    def _parts(self, parameters: Sequence[TrainedParameter]) -> Iterator[list[TrainedParameter]]:
        """Parameters that are updated together: so few, where possible, that their float32 weights take little memory."""
        limit: float = math.inf
        if self._settings.is_separable and self._settings.master != "float32":
            limit = min(MAX_OPEN_ELEMENTS, CPU_OPEN_ELEMENTS) if self._device.type == "cpu" else MAX_OPEN_ELEMENTS
        part, size = list[TrainedParameter](), 0
        for parameter in parameters:
            if part and size + parameter.weight.numel() > limit:
                yield part
                part, size = [], 0
            part.append(parameter)
            size += parameter.weight.numel()
        if part:
            yield part

    @contextlib.contextmanager
    def _limited_to(self, parameters: Sequence[TrainedParameter]) -> Iterator[None]:
        """Within it, the optimizer knows of these parameters only."""
        if len(parameters) == len(self._owned):
            yield
            return
        groups = self._torch_groups
        everything = [entry["params"] for entry in groups]
        for entry in groups:
            entry["params"] = []
        for parameter in parameters:
            master = parameter.owned.parameter
            groups[self._group_of[master]]["params"].append(master)
        try:
            yield
        finally:
            for entry, masters in zip(groups, everything, strict=True):
                entry["params"] = masters

    def _step_with_sums(self) -> None:
        """A step of an optimizer with `sums` and `finish` (optim/prodigy.py). Ranks that own nothing take part, too."""
        shape = (len(self._network.parameter_names), self._network.num_sums)
        rows = torch.zeros(shape, dtype=torch.float64, device=self._device)
        if self._optimizer is not None:
            index_of = {parameter.owned.parameter: parameter.index for parameter in self._owned}
            order = [index_of[master] for entry in self._torch_groups for master in entry["params"]]
            rows[torch.tensor(order, device=self._device)] = self._optimizer.sums().to(self._device)
        dist.all_reduce(rows)
        if self._optimizer is not None:
            self._optimizer.finish(rows.cpu().sum(dim=0).tolist())

    @torch.no_grad()
    def update_averages(self, decay: float) -> None:
        """Adds the weights to the moving average, of which the fraction `decay` is kept; the first time, copies them."""
        for parameter in self._owned:
            weights = parameter.owned.read()
            if parameter.average is None:
                parameter.average = weights.clone()
            else:
                parameter.average.lerp_(weights, 1 - decay)

    # --- working weights -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def evaluated_weights(self, *, ema: bool) -> Iterator[None]:
        """Within it, the working weights are those to evaluate, see `read_weights`; afterwards the same weights as before.

        All replicas together.
        """
        if not (ema or self._is_schedule_free):
            yield
            return
        for parameter in self._owned:
            shown = self._shown(parameter, ema=ema)
            if parameter.owned.keeps_weight:
                self._kept[parameter] = parameter.weight.detach().clone()
            parameter.weight.detach().copy_(shown)
        self._exchange.share_weights()
        yield
        # Not in a `finally`: ranks wait for each other here, and where one has failed the others would wait for ever.
        for parameter in self._owned:
            if (kept := self._kept.pop(parameter, None)) is not None:
                parameter.weight.detach().copy_(kept)
            else:
                parameter.weight.detach().copy_(parameter.owned.read())
        self._exchange.share_weights()

    def _shown(self, parameter: TrainedParameter, *, ema: bool) -> Tensor:
        """An owned parameter's float32 weights as they are evaluated and exported."""
        if ema:
            assert parameter.average is not None
            return parameter.average
        assert self._optimizer is not None
        weights, master = parameter.owned.read(self._kept.get(parameter)), parameter.owned.parameter
        group = self._torch_groups[self._group_of[master]]
        return evaluation_weights(weights, self._optimizer.state.get(master, {}), group)

    def _is_anywhere(self, is_here: bool) -> bool:
        """Whether it is so on any rank: one that owns nothing has no optimizer, and still takes part in all exchanges."""
        found = torch.tensor([float(is_here)], device=self._device)
        dist.all_reduce(found)
        return bool(found.item())

    # --- training state ----------------------------------------------------------------------------------------------

    def read_state(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """Float32 weights, average and optimizer state of one parameter, on the CPU; numbers as scalars.

        All replicas must call it for the same parameters in the same order.
        """
        parameter = self._of_weight[weight]
        tensors: dict[str, Tensor] | None = None
        if parameter.master is not None:
            assert self._optimizer is not None
            state = to_tensors(self._optimizer.state.get(parameter.owned.parameter, {}))
            average = {} if parameter.average is None else {EMA: parameter.average}
            tensors = {MASTER: parameter.owned.read(), **state, **average, **self._group_numbers(parameter)}
        return self._replicas.share(tensors, parameter.owner, self._device)

    def _group_numbers(self, parameter: TrainedParameter) -> dict[str, Tensor]:
        """The numbers of the parameter's group that have changed since the start, such as a count of steps."""
        index = self._group_of[parameter.owned.parameter]
        numbers, first = _numbers(self._torch_groups[index]), self._first_numbers[index]
        changed = {name: value for name, value in numbers.items() if first.get(name) != value}
        return {f"{GROUP_NUMBER}{name}": tensor for name, tensor in to_tensors(changed).items()}

    def read_weights(self, weight: nn.Parameter, *, ema: bool = False) -> Tensor:
        """The float32 weights of one parameter that are evaluated and exported, or their average, on the CPU.

        They are those of the last step, but for schedule-free optimizers. Called as `read_state`. An average must exist.
        """
        parameter = self._of_weight[weight]
        tensors = {MASTER: self._shown(parameter, ema=ema)} if parameter.master is not None else None
        return self._replicas.share(tensors, parameter.owner, self._device)[MASTER]

    @torch.no_grad()
    def write_states(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Sets what `read_state` returned, for any of the parameters; of `master` alone, the weights only."""
        for weight, state in states.items():
            parameter = self._of_weight[weight]
            if parameter.master is None:
                round_weights(self._settings.master, weight, state[MASTER])
                continue
            assert self._optimizer is not None
            parameter.master.write(state[MASTER])
            if EMA in state:
                parameter.average = state[EMA].to(self._device, copy=True)
            entry, own = self._torch_groups[self._group_of[parameter.owned.parameter]], dict[str, Tensor]()
            numbers = {name.removeprefix(GROUP_NUMBER): value for name, value in state.items() if GROUP_NUMBER in name}
            entry.update(from_tensors(numbers))
            for name, value in state.items():
                if name not in (MASTER, EMA) and GROUP_NUMBER not in name:
                    own[name] = _placed(name, value, self._device, entry)
            if own:
                self._optimizer.state[parameter.owned.parameter] = from_tensors(own)

    def close(self) -> None:
        """Releases gradients, float32 weights, averages and optimizer state; no step can follow."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.master = parameter.average = parameter.gradient = None
        self._parameters, self._owned, self._optimizer = [], [], None
        self._exchange.close()
        self._of_weight.clear()
        self._group_of.clear()


def _numbers(entry: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a torch parameter group but its learning rate, which the schedule sets."""
    return {name: value for name, value in entry.items() if name != "lr" and type(value) in (int, float)}


def _placed(name: str, value: Tensor, device: torch.device, entry: Mapping[str, Any]) -> Tensor:
    """A copy of an optimizer's state where the optimizer keeps it: step counts on the CPU, unless the kernels read them."""
    on_cpu = value.dim() == 0 and (value.dtype == torch.float64 or name == "step")
    on_cpu = on_cpu and not (entry.get("fused") or entry.get("capturable"))
    return value.clone() if on_cpu else value.to(device, copy=True)
