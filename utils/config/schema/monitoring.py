"""The `[monitoring]` table."""

from __future__ import annotations

from pydantic import Field

from utils.config.schema.base import Bool, Table


class MonitoringConfig(Table):
    """What is written down while training."""

    tensorboard: Bool = Field(True, description="Write TensorBoard events beside metrics.jsonl.")
