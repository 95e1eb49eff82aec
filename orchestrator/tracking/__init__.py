"""A run's numbers: a file that is the truth, and wandb as its mirror."""

from orchestrator.tracking.metrics import MetricsFile, read_metrics
from orchestrator.tracking.mirror import Mirror, start_mirror
from orchestrator.tracking.run_description import RunDescription

__all__ = ["MetricsFile", "Mirror", "RunDescription", "read_metrics", "start_mirror"]
