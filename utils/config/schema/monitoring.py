"""The `[monitoring]` table."""

from __future__ import annotations

from pydantic import Field

from utils.config.schema.base import Bool, Table


class MonitoringConfig(Table):
    """Logs of a run."""

    tensorboard: Bool = Field(True, description="Write TensorBoard events to the run folder, besides `metrics.jsonl`.")
    report: Bool = Field(True, description="Write the page `report.html` to the run folder and keep it up to date.")
