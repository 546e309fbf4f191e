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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.pipeline.ownership import assign_owners, make_buckets
from utils.trainable.base import ParameterGroup

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""torch's dictionaries of parameter groups -> optimizer."""

MASTER = "master"
"""Name of the float32 weights in a parameter's state, beside the optimizer's own states."""
EMA = "ema"
"""Name of the average of the float32 weights over the steps in a parameter's state."""


@dataclass(frozen=True)
class Replicas:
    """The processes that hold the same stage."""

    ranks: Sequence[int]
    """Their global ranks."""
    index: int
    """The position of this process among them."""
    group: dist.ProcessGroup | None
    """None: all processes."""

    @property
    def count(self) -> int:
        return len(self.ranks)

    def reduce(self, vector: Tensor, owner: int) -> None:
        """Sums the vector over the replicas, on its owner."""
        dist.reduce(vector, dst=self.ranks[owner], group=self.group)

    def broadcast(self, vector: Tensor, owner: int) -> None:
        dist.broadcast(vector, src=self.ranks[owner], group=self.group)

    def share(self, tensors: Mapping[str, Tensor] | None, owner: int, device: torch.device) -> dict[str, Tensor]:
        """Copies of the owner's tensors by name, on every replica, on the CPU. The others give None."""
        if self.count == 1:
            assert tensors is not None
            return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        header = [[(name, tensor.shape, tensor.dtype) for name, tensor in (tensors or {}).items()]]
        dist.broadcast_object_list(header, src=self.ranks[owner], group=self.group, device=device)
        shared: dict[str, Tensor] = {}
        for name, shape, dtype in header[0]:
            empty = torch.empty(shape, dtype=dtype, device=device)
            buffer = tensors[name].to(device).contiguous() if tensors is not None else empty
            self.broadcast(buffer, owner)
            shared[name] = buffer.to("cpu", copy=True)
        return shared


@dataclass(frozen=True)
class Network:
    """What every rank knows of the whole network's training."""

    parameter_names: Sequence[str]
    """Native names of the trained parameters of all stages, in the network's order."""
    num_losses: int
    """Micro-batches of all replicas together."""


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


@dataclass(eq=False)
class TrainedParameter:
    """A trained parameter of this stage."""

    name: str
    """Native name."""
    index: int
    """Position among the trained parameters of all stages."""
    weight: nn.Parameter
    """What the network computes with, in the training precision."""
    owner: int
    """The replica that updates it."""
    master: nn.Parameter | None = None
    """The owner's float32 weights: `weight` itself if that is float32."""
    average: Tensor | None = None
    """The owner's moving average of the float32 weights; None until there is one."""
    gradient: Tensor | None = None
    """The float32 sum over the micro-batches so far, then the mean over the replicas; None between steps."""

    def collect(self, weight: Tensor) -> None:
        """Adds the gradient of a micro-batch. A hook that runs once backward has computed it."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if self.gradient is None:
            self.gradient = gradient.float()
        else:
            self.gradient.add_(gradient)


class OptimizerStep:
    """The trained parameters of this stage and the optimizer of those that this replica owns."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        network: Network,
        replicas: Replicas,
        *,
        make_optimizer: MakeOptimizer,
        max_norm: float,
        device: torch.device,
    ) -> None:
        """`groups` of the stage's parameters; `max_norm` 0: no clipping."""
        self._network, self._replicas, self._max_norm, self._device = network, replicas, max_norm, device
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
            low = parameter.weight.dtype != torch.float32
            parameter.master = nn.Parameter(parameter.weight.detach().float()) if low else parameter.weight
        self._hooks = [one.weight.register_post_accumulate_grad_hook(one.collect) for one in self._parameters]
        self._buckets = make_buckets(sizes, owners) if replicas.count > 1 else []
        self._slots = torch.tensor([parameter.index for parameter in self._owned], dtype=torch.long, device=device)
        entries = {group.name: self._entry(group) for group in groups}
        self._entries = {name: entry for name, entry in entries.items() if entry["params"]}
        self._optimizer = make_optimizer(list(self._entries.values())) if self._entries else None
        self._is_averaged = False
        """Whether float32 weights and averages are exchanged, see `averaged_weights`."""

    def _entry(self, group: ParameterGroup) -> dict[str, Any]:
        """The group as torch's optimizers take it: of the parameters that this replica owns."""
        own = [self._of_weight[weight] for weight in group.parameters.values()]
        decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        return {"params": [one.master for one in own if one.master is not None], "lr": group.schedule.peak, **decay}

    # --- a step ------------------------------------------------------------------------------------------------------

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Sets the learning rate of each group, given by name."""
        if self._optimizer is not None:
            for name, entry in zip(self._entries, self._optimizer.param_groups, strict=True):
                entry["lr"] = rates[name]

    @torch.no_grad()
    def run(self, losses: Sequence[Tensor]) -> StepReport:
        """Updates the weights from the gradients collected since the last step. All ranks together.

        `losses` of this replica's micro-batches on the last stage, scalars; empty on others.
        """
        self._reduce()
        report = self._measure(losses)
        if report.is_finite:
            self._update(report.grad_norm)
        for parameter in self._parameters:
            parameter.gradient = None
        return report

    def _reduce(self) -> None:
        """Gives each owner the mean gradients of its parameters; other replicas release theirs."""
        for parameter in self._parameters:
            if parameter.gradient is None:  # not reached by the loss; replicas must agree on what is sent
                parameter.gradient = torch.zeros_like(parameter.weight, dtype=torch.float32)
        for bucket in self._buckets:
            members = [self._parameters[member] for member in bucket.members]
            vector = torch.cat([one.gradient.div_(self._replicas.count).flatten() for one in members])  # type: ignore[union-attr]
            self._replicas.reduce(vector, bucket.owner)
            for member, part in zip(members, _split(vector, members), strict=True):
                if bucket.owner == self._replicas.index:
                    member.gradient.copy_(part)  # type: ignore[union-attr]
                else:
                    member.gradient = None

    def _measure(self, losses: Sequence[Tensor]) -> StepReport:
        """Norm of every parameter's gradient and every loss, in one vector that has a slot for each.

        All slots but those of one rank are zero, so that the sum over the ranks is exact, and the norm has the same bits on
        any number of stages.
        """
        count = len(self._network.parameter_names)
        values = torch.zeros(count + self._network.num_losses, dtype=torch.float64, device=self._device)
        if self._owned:
            norms = torch._foreach_norm([one.gradient for one in self._owned], 2, dtype=torch.float64)
            values[self._slots] = torch.stack(norms)
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

    def _update(self, grad_norm: float) -> None:
        gradients = [parameter.gradient for parameter in self._owned]
        if self._max_norm > 0 and gradients:
            factor = float((self._max_norm / (torch.tensor(grad_norm) + 1e-6)).clamp(max=1.0))
            if factor < 1:
                torch._foreach_mul_(gradients, factor)
        if self._optimizer is not None:
            for parameter in self._owned:
                parameter.master.grad = parameter.gradient  # type: ignore[union-attr]
            self._optimizer.step()
            for parameter in self._owned:
                parameter.master.grad = None  # type: ignore[union-attr]
        self._refresh_weights()

    @torch.no_grad()
    def update_averages(self, decay: float) -> None:
        """Adds the weights to the moving average, of which the fraction `decay` is kept; the first time, copies them."""
        for parameter in self._owned:
            assert parameter.master is not None
            if parameter.average is None:
                parameter.average = parameter.master.detach().clone()
            else:
                parameter.average.lerp_(parameter.master, 1 - decay)

    # --- working weights -----------------------------------------------------------------------------------------------

    def _refresh_weights(self) -> None:
        """Rounds the owners' float32 weights to the working weights and sends these to the other replicas."""
        pairs = [(one.weight, one.master) for one in self._owned if one.master is not one.weight]
        if pairs:
            torch._foreach_copy_([weight for weight, _ in pairs], [master for _, master in pairs])
        self._share_weights()

    def _share_weights(self) -> None:
        for bucket in self._buckets:
            members = [self._parameters[member] for member in bucket.members]
            vector = torch.cat([one.weight.detach().flatten() for one in members])
            self._replicas.broadcast(vector, bucket.owner)
            if bucket.owner != self._replicas.index:
                torch._foreach_copy_([one.weight for one in members], list(_split(vector, members)))

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it, the working weights are the average; afterwards the same weights as before. All replicas together."""
        self._swap_averages()
        yield
        # Not in a `finally`: ranks wait for each other here, and where one has failed the others would wait for ever.
        self._swap_averages()

    @torch.no_grad()
    def _swap_averages(self) -> None:
        """Exchanges float32 weights and their average."""
        for parameter in self._owned:
            assert parameter.master is not None and parameter.average is not None
            master = parameter.master.detach().clone()
            parameter.master.copy_(parameter.average)
            parameter.average.copy_(master)
        self._is_averaged = not self._is_averaged
        self._refresh_weights()

    # --- training state ----------------------------------------------------------------------------------------------

    def read_state(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """Float32 weights, average and optimizer state of one parameter, on the CPU; numbers as scalars.

        All replicas must call it for the same parameters in the same order.
        """
        parameter = self._of_weight[weight]
        tensors: dict[str, Tensor] | None = None
        if parameter.master is not None:
            assert self._optimizer is not None
            state = self._optimizer.state.get(parameter.master, {})
            average = {} if parameter.average is None else {EMA: parameter.average}
            own = {name: torch.as_tensor(value) for name, value in state.items()}
            tensors = {MASTER: parameter.master.detach(), **own, **average}
        return self._replicas.share(tensors, parameter.owner, self._device)

    def read_weights(self, weight: nn.Parameter, *, ema: bool = False) -> Tensor:
        """The float32 weights of one parameter, or their average, on the CPU; as `read_state`. An average must exist."""
        parameter = self._of_weight[weight]
        tensor = parameter.average if ema != self._is_averaged else parameter.master
        tensors = {MASTER: tensor.detach()} if tensor is not None else None
        return self._replicas.share(tensors, parameter.owner, self._device)[MASTER]

    @torch.no_grad()
    def write_states(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Sets what `read_state` returned, for any of the parameters; of `master` alone, the weights only."""
        entries = self._optimizer.param_groups if self._optimizer is not None else []
        entry_of = {master: entry for entry in entries for master in entry["params"]}
        for weight, state in states.items():
            parameter = self._of_weight[weight]
            weight.copy_(state[MASTER])
            if parameter.master is None:
                continue
            assert self._optimizer is not None
            parameter.master.copy_(state[MASTER])
            if EMA in state:
                parameter.average = state[EMA].to(self._device, copy=True)
            own = {
                name: _placed(name, value, self._device, entry_of[parameter.master])
                for name, value in state.items()
                if name not in (MASTER, EMA)
            }
            if own:
                self._optimizer.state[parameter.master] = own

    def close(self) -> None:
        """Releases gradients, float32 weights, averages and optimizer state; no step can follow."""
        for hook in self._hooks:
            hook.remove()
        self._parameters, self._owned, self._optimizer = [], [], None
        self._of_weight.clear()
        self._entries.clear()


def _split(vector: Tensor, members: Sequence[TrainedParameter]) -> Iterator[Tensor]:
    """The parts of a bucket's vector, in the shapes of its parameters."""
    for part, member in zip(vector.split([one.weight.numel() for one in members]), members, strict=True):
        yield part.view_as(member.weight)


def _placed(name: str, value: Tensor, device: torch.device, entry: Mapping[str, Any]) -> Tensor:
    """A copy of an optimizer's state where the optimizer keeps it: step counts on the CPU, unless the kernels read them."""
    on_cpu = value.dim() == 0 and (value.dtype == torch.float64 or name == "step")
    on_cpu = on_cpu and not (entry.get("fused") or entry.get("capturable"))
    return value.clone() if on_cpu else value.to(device, copy=True)
