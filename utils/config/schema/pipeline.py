"""The `[pipeline]` table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from utils.config.schema.base import Int, Table


class PipelineConfig(Table):
    """How the network and the batch are laid out over the processes."""

    pipeline_stages: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Consecutive parts the network is cut into, one a process; must divide the number of processes. What "
        "remains is data parallel. `auto`: one stage for each process.",
    )
    micro_batch_size_per_gpu: Int = Field(1, ge=1, description="Images that go through a stage at once.")
    gradient_accumulation_steps: Int = Field(
        1, ge=1, description="Micro-batches in a step for each replica. At least four times the stages keeps them busy."
    )
