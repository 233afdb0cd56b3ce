"""What is measured on each network, what it can't do, and what others publish about the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.memory.networks import Subject
from lightning_local import LocalLearner, Partition, heads, methods
from lightning_local.methods import LocalMethod

__all__ = ["CONFIGURATIONS", "LABELS", "OTHERS", "Configuration", "checked", "reason_against"]

# The random images are in [0, 1] once multiplied by 0.1 and moved by 0.5, nearly always.
PIXELS = ([0.5], [0.1])


@dataclass(frozen=True)
class Configuration:
    """A method with everything that changes its memory.

    Args:
        name: Of the method, with its settings.
        method: Makes it.
        recompute: As the learner's.
        partition: As the learner's.
    """

    name: str
    method: Callable[[], LocalMethod]
    recompute: Any = "none"
    partition: Any = "units"

    @property
    def label(self) -> str:
        """Name and recomputation."""
        return self.name if self.recompute == "none" else f"{self.name}, {self.recompute}"

    def learner(self, subject: Subject) -> LocalLearner:
        """The wrapped module, not yet cut."""
        return LocalLearner(subject.make(), self.method(), self.partition, recompute=self.recompute)


def _even(num_modules: int) -> Partition:
    return Partition(num_modules=num_modules, balance="memory")


def _infopro(num_modules: int) -> Configuration:
    return Configuration(
        f"InfoPro, K={num_modules}",
        lambda: methods.InfoPro(denormalize=PIXELS),
        partition=_even(num_modules),
    )


def _auglocal(depth: int, recompute: str = "none") -> Configuration:
    return Configuration(f"AugLocal, d={depth}", lambda: methods.AugLocal(depth=depth), recompute)


CONFIGURATIONS = [
    Configuration("end to end", methods.EndToEnd),
    Configuration("end to end", methods.EndToEnd, "blocks"),
    Configuration("Greedy", methods.Greedy),
    Configuration("Greedy, K=4", methods.Greedy, partition=_even(4)),
    Configuration("DGL", methods.DGL),
    Configuration("PredSim", methods.PredSim),
    _infopro(2),
    _infopro(4),
    _auglocal(2),
    _auglocal(2, "body"),
    _auglocal(2, "blocks"),
    _auglocal(5),
    _auglocal(6),
    _auglocal(6, "body"),
    _auglocal(6, "blocks"),
    Configuration("BackLink", methods.BackLink),
    Configuration("BackLink", methods.BackLink, "body"),
    Configuration("BackLink, linear heads", lambda: methods.BackLink(head=heads.Linear())),
    Configuration("SGR", methods.SGR),
    Configuration("SGR, linear heads", lambda: methods.SGR(head=heads.Linear())),
]

# Of these and of those that `checked` has besides, in their order.
LABELS = [configuration.label for configuration in CONFIGURATIONS]
LABELS.insert(LABELS.index("AugLocal, d=2"), "AugLocal, d=1")


def checked(network: str) -> list[Configuration]:
    """Those in which a prediction is compared with a fit."""
    return [
        Configuration("end to end", methods.EndToEnd),
        Configuration("Greedy", methods.Greedy),
        _auglocal(1 if network in SHALLOW else 2),
        Configuration("BackLink", methods.BackLink),
        Configuration("SGR", methods.SGR),
    ]


SHALLOW = ("small ViT", "small GPT", "MLP")


def reason_against(network: str, configuration: Configuration) -> str:
    """Why a network can't be trained so; empty if it can."""
    if "GPT" in network and configuration.name.startswith("InfoPro"):
        return "InfoPro rebuilds the input, and tokens are no numbers"
    if network.startswith("mobilenet") and configuration.name == "SGR":
        return "torch has no second derivative of hardsigmoid"
    return ""


# Peaks relative to end to end, of the same network, batch (but for resnet152) and K; the README
# names the sources.
OTHERS = {
    ("ResNet-32", "end to end, blocks"): 802 / 2464,
    ("ResNet-32", "DGL"): 470 / 2464,
    ("ResNet-32", "PredSim"): 594 / 2464,
    ("ResNet-32", "AugLocal, d=2"): 619 / 2464,
    ("ResNet-32", "AugLocal, d=5"): 1070 / 2464,
    ("ResNet-32", "AugLocal, d=6"): 1198 / 2464,
    ("ResNet-110", "end to end, blocks"): 2250 / 8298,
    ("ResNet-110", "DGL"): 500 / 8298,
    ("ResNet-110", "PredSim"): 611 / 8298,
    ("ResNet-110", "InfoPro, K=2"): 5.38 / 9.40,
    ("ResNet-110", "InfoPro, K=4"): 3.52 / 9.40,
    ("ResNet-110", "AugLocal, d=2"): 668 / 8298,
    ("ResNet-110", "AugLocal, d=5"): 1150 / 8298,
    ("ResNet-110", "AugLocal, d=6"): 1289 / 8298,
    ("resnet152", "InfoPro, K=2"): 15.53 / 26.29,
    ("resnet152", "InfoPro, K=4"): 13.48 / 26.29,
}
