"""AugLocal's own code, from a checkout that the user has; no line of it is here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["TheirLoop", "check"]

# The networks' units, of which the authors take the head's depth off.
UNITS = {"resnet32": 16, "resnet110": 55}


def check(path: Path, network: str) -> None:
    """Before anything is timed.

    Raises:
        ValueError: There is no such checkout, or it doesn't have the network.
    """
    if network not in UNITS:
        raise ValueError(f"The authors' code has {', '.join(UNITS)}; got --network {network}.")
    if not (path / "networks" / "resnet.py").is_file():
        raise ValueError(f"--authors {path}: there is no networks/resnet.py; clone AugLocal there.")


class TheirLoop:
    """Their network and the loop of their `train.py`, without its metrics, which would cost more.

    Args:
        path: The checkout.
        network: Of `UNITS`.
        batch: Images in a batch.
        depth: Of the heads; 0 for end-to-end backpropagation.
        make_optimizer: Makes the one optimizer of all parameters.
    """

    def __init__(
        self, path: Path, network: str, batch: int, depth: int, make_optimizer: Any
    ) -> None:
        sys.path.insert(0, str(path))
        try:
            make: Any = getattr(importlib.import_module("networks.resnet"), network)
        finally:
            sys.path.remove(str(path))
        heads = {"aux_net_config": "unifSamp", "rule": "AugLocal", "aux_net_depth": depth}
        self.network: nn.Module = make(
            local_module_num=UNITS[network] - depth if depth else 1,
            batch_size=batch,
            is_pyramid=depth > 0,
            paramid_coeff=0.5,
            **(heads if depth else {"rule": "BP"}),
        )
        self.optimizer: torch.optim.Optimizer = make_optimizer(self.network.parameters())

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One batch; their forward calls backward."""
        self.optimizer.zero_grad()
        self.network(img=x, target=y, ixx_1=0.0, ixy_1=1.0, ixx_2=0.0, ixy_2=1.0)
        self.optimizer.step()
