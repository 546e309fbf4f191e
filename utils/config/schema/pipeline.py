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
    bucket_group: Annotated[Int, Field(ge=1)] | None = Field(
        None,
        description="Size of the groups of images that a step consists of. All images of a group have one bucket; the "
        "smaller the groups, the fewer images of rare buckets are repeated to fill them. Must be a multiple of "
        "`micro_batch_size_per_gpu` x replicas that divides the global batch, and cannot change when a run resumes. Unset: "
        "the smallest, and when a run resumes, that of its checkpoint.",
    )
    recompute: Annotated[Int, Field(ge=0)] | Literal["none", "norms", "matmuls", "all", "auto"] = Field(
        "none",
        description="Activations that are computed again in the backward pass instead of being kept, which saves memory and "
        "takes time; losses are the same. `norms`: norms, modulation and activation functions, a third of the memory. "
        "`matmuls`: all but the outputs of matrix products and attention. `all`: whole blocks, of which only the inputs are "
        "kept. A number: the first so many blocks of each stage whole. `auto`: what costs the least time of these and fits "
        "the memory of the device, for each stage.",
    )
    partition: Literal["cost", "measured", "uniform"] | list[Int] = Field(
        "cost",
        description="How the blocks are divided into stages. `cost`: so that the slowest stage takes the least time, "
        "estimated from the operations of each layer at the sizes of the images. `measured`: the same, with times "
        "measured at the start. `uniform`: as many blocks for each stage. A list: the number of blocks of each stage, such "
        "as `[11, 13]`. Losses are the same.",
    )

    @field_validator("partition", mode="before")
    @classmethod
    def _check_kind(cls, value: Any) -> Any:
        """One error for a value of none of these kinds."""
        is_list = isinstance(value, list) and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
        if not is_list and value not in ("cost", "measured", "uniform"):
            kinds = "must be 'cost', 'measured', 'uniform', or a list with the number of blocks of each stage"
            raise ValueError(kinds)
        return value
