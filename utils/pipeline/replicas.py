"""What the replicas of a stage exchange: gradients on their way to the owners, weights on their way back, training state.

Gradients are sent in buckets, each as soon as the last micro-batch's backward pass has completed it; that pass continues.
Needs torch.distributed, but not DeepSpeed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.pipeline.masters import Master


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

    def start_reduce(self, vector: Tensor, owner: int) -> dist.Work:
        """Starts to sum the vector over the replicas, on its owner."""
        work: dist.Work = dist.reduce(vector, dst=self.ranks[owner], group=self.group, async_op=True)
        return work

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
    master: Master | None = None
    """The owner's float32 weights."""
    average: Tensor | None = None
    """The owner's moving average of the float32 weights; None until there is one."""
    gradient: Tensor | None = None
    """After the backward passes: the float32 sum over the micro-batches, then the mean over the replicas."""

    @property
    def summed(self) -> Tensor:
        """The gradient, where there must be one."""
        assert self.gradient is not None
        return self.gradient

    @property
    def owned(self) -> Master:
        """The float32 weights, on the owner."""
        assert self.master is not None
        return self.master

    def add_gradient(self) -> None:
        """Takes what backward has put into `weight.grad` and adds it in float32."""
        gradient, self.weight.grad = self.weight.grad, None
        assert gradient is not None
        if self.gradient is None:
            self.gradient = gradient.float()
        else:
            self.gradient.add_(gradient)

    def take_gradient(self) -> None:
        """Completes the sum over the step's micro-batches; zeros if the loss does not reach the weight."""
        if self.weight.grad is not None:
            self.add_gradient()
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.weight, dtype=torch.float32)


class Members(NamedTuple):
    """The parameters of a bucket."""

    owner: int
    parameters: Sequence[TrainedParameter]

    def parts(self, vector: Tensor) -> Iterator[tuple[TrainedParameter, Tensor]]:
        """Each parameter with its part of the bucket's vector, in its shape."""
        sizes = [parameter.weight.numel() for parameter in self.parameters]
        for part, parameter in zip(vector.split(sizes), self.parameters, strict=True):
            yield parameter, part.view_as(parameter.weight)


class GradientExchange:
    """Gives each owner the mean gradients of its parameters, and the other replicas its new weights.

    Buckets are sent in one order on all replicas, whatever the order in which backward completes them.
    """

    def __init__(self, buckets: Sequence[Members], replicas: Replicas) -> None:
        """`buckets`: in the order in which backward is expected to complete them; none for a single replica."""
        self._buckets, self._replicas = buckets, replicas
        self._bucket_of = {one: index for index, bucket in enumerate(buckets) for one in bucket.parameters}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        """The buckets that are on their way: the first so many."""
        self._missing: list[int] = []
        """Per bucket: parameters whose gradient is not complete in this step."""
        self._arrived: set[TrainedParameter] = set()
        self._begin_step()

    def _begin_step(self) -> None:
        self._missing = [len(bucket.parameters) for bucket in self._buckets]
        self._arrived.clear()

    def has(self, parameter: TrainedParameter) -> bool:
        """Whether the gradient of the parameter was added in this step."""
        return parameter in self._arrived

    def add(self, parameter: TrainedParameter) -> None:
        """Takes a gradient that is complete for this step, and starts to send the buckets that are complete."""
        if not self._buckets:
            return
        self._arrived.add(parameter)
        self._missing[self._bucket_of[parameter]] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send(self._buckets[len(self._sent)])

    def _send(self, bucket: Members) -> None:
        vector = torch.cat([one.summed.div_(self._replicas.count).flatten() for one in bucket.parameters])
        for parameter in bucket.parameters:
            parameter.gradient = None
        self._sent.append((self._replicas.start_reduce(vector, bucket.owner), vector))

    def finish(self) -> None:
        """Adds what is missing, waits, and leaves the mean gradients with their owners. Every gradient must exist."""
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                if parameter not in self._arrived:
                    self.add(parameter)
        assert len(self._sent) == len(self._buckets)
        for bucket in self._buckets:
            work, vector = self._sent.popleft()  # one vector after the other is released
            work.wait()
            if bucket.owner == self._replicas.index:
                for parameter, part in bucket.parts(vector):
                    parameter.gradient = part.clone()
        self._begin_step()

    @torch.no_grad()
    def share_weights(self) -> None:
        """Sends the owners' working weights to the other replicas."""
        for bucket in self._buckets:
            vector = torch.cat([one.weight.detach().flatten() for one in bucket.parameters])
            self._replicas.broadcast(vector, bucket.owner)
            if bucket.owner != self._replicas.index:
                weights, parts = zip(*((one.weight, part) for one, part in bucket.parts(vector)), strict=True)
                torch._foreach_copy_(list(weights), list(parts))

    def close(self) -> None:
        """Releases the parameters."""
        self._buckets, self._bucket_of = [], {}
