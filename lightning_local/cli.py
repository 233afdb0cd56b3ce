"""The command line: `lightning-local` and `python -m lightning_local`."""

from __future__ import annotations

import os
import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

__all__ = ["LocalCLI", "main"]


class LocalCLI(LightningCLI):
    """LightningCLI for learners and datamodules given by `class_path`.

    Args:
        kwargs: Whatever `LightningCLI` takes.
    """

    def __init__(self, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "model_class": pl.LightningModule,
            "datamodule_class": pl.LightningDataModule,
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "save_config_kwargs": {"overwrite": True},
        }
        super().__init__(**{**defaults, **kwargs})


def main(args: list[str] | None = None) -> None:
    """Runs `fit`, `validate`, `test` or `predict`.

    Args:
        args: Command line without the program's name; default the process's.
    """
    # A console script does not see the working directory, where the user's classes are.
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    LocalCLI(args=args)
