"""The `[pipeline]` table."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from utils.config.schema.base import Int, Table


class PipelineConfig(Table):
    """How the network and the batch are distributed over the processes."""

    pipeline_stages: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Number of consecutive parts of the network, one per process. Must divide the number of processes; "
        "processes beyond the stages of one replica form further replicas (data parallelism). `auto`: as many stages as "
        "processes.",
    )
    micro_batch_size_per_gpu: Int = Field(1, ge=1, description="Number of images that pass through a stage at once.")
    gradient_accumulation_steps: Int = Field(
        1,
        ge=1,
        description="Number of micro-batches per step and replica. With several stages, use at least four times their "
        "number to keep them busy.",
    )
    recompute: Annotated[Int, Field(ge=0)] | Literal["none", "all"] = Field(
        "none",
        description="Blocks whose activations are computed again in the backward pass instead of being kept, which saves "
        "memory and takes time: the first so many of each stage, or all. Losses are the same.",
    )
    partition: Literal["cost", "measured", "uniform"] | list[Int] = Field(
        "cost",
        description="How the blocks are divided into stages. `cost`: so that the slowest stage takes the least time, "
        "estimated from the operations of each layer at the sizes of the images. `measured`: the same, with times "
        "measured at the start. `uniform`: as many blocks for each stage. A list: the number of blocks of each stage, such "
        "as `[11, 13]`. Losses are the same.",
    )

    def num_recomputed(self, num_blocks: int) -> int:
        """The number of blocks of each stage, from its first on, that are recomputed."""
        return self.recompute if isinstance(self.recompute, int) else {"none": 0, "all": num_blocks}[self.recompute]

    @field_validator("partition", mode="before")
    @classmethod
    def _check_kind(cls, value: Any) -> Any:
        """One error for a value of none of these kinds."""
        is_list = isinstance(value, list) and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
        if not is_list and value not in ("cost", "measured", "uniform"):
            kinds = "must be 'cost', 'measured', 'uniform', or a list with the number of blocks of each stage"
            raise ValueError(kinds)
        return value
