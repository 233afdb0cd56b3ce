"""A look at a checkpoint's file before anything reads it."""

from __future__ import annotations

import os
import zipfile
from typing import Any

__all__ = ["guard_loading", "unguard_loading"]


def guard_loading(strategy: Any) -> None:
    """Lets the strategy look whether a file is whole before it reads one; until `unguard`."""
    read = type(strategy).load_checkpoint.__get__(strategy)

    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        _check_file(checkpoint_path)
        return read(checkpoint_path, *args, **kwargs)

    strategy.load_checkpoint = load_checkpoint


def unguard_loading(strategy: Any) -> None:
    """Gives the strategy its own method back."""
    strategy.__dict__.pop("load_checkpoint", None)


def _check_file(path: Any) -> None:
    if not os.path.isfile(path):
        return  # not ours to judge: a folder, another file system, or Lightning's own error
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"" or (start == b"PK" and not zipfile.is_zipfile(path)):
        raise ValueError(
            f"The checkpoint {os.fspath(path)!r} is truncated ({os.path.getsize(path):,} bytes): "
            "copy it again, or resume from an older one."
        )
