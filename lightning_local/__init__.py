"""Local learning for PyTorch Lightning: wrap a LightningModule, train it in local modules."""

from lightning_local import couplings, heads, losses, methods
from lightning_local.callbacks import LocalSummary
from lightning_local.cli import LocalCLI
from lightning_local.early_exit import EarlyExit
from lightning_local.learner import LocalLearner
from lightning_local.partition import Partition
from lightning_local.planner import plan_partition
from lightning_local.strategy import LocalParallelStrategy

__all__ = [
    "EarlyExit",
    "LocalCLI",
    "LocalLearner",
    "LocalParallelStrategy",
    "LocalSummary",
    "Partition",
    "couplings",
    "heads",
    "losses",
    "methods",
    "plan_partition",
]
