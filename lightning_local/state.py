"""What a checkpoint holds: the user's file, plus one entry of ours.

The file loads in the user's plain class. Heads, split points and random streams live under one
extra key, as plain types and tensors, so that `weights_only=True` loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["ENTRY", "load", "save"]

ENTRY = "lightning_local"
_PREFIX = "module."
_HPARAMS = (
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY,
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_NAME,
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE,
)


def save(learner: LocalLearner, checkpoint: dict[str, Any]) -> None:
    """Turns the learner's checkpoint into one of the user's module."""
    state = checkpoint["state_dict"]
    own = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
    heads = {k: v for k, v in state.items() if not k.startswith(_PREFIX)}
    checkpoint["state_dict"] = own
    for key in _HPARAMS:
        checkpoint.pop(key, None)
    module = learner.module
    if module.hparams:
        if hasattr(module, "_hparams_name"):
            checkpoint[module.CHECKPOINT_HYPER_PARAMS_NAME] = module._hparams_name
        checkpoint[module.CHECKPOINT_HYPER_PARAMS_KEY] = dict(module.hparams)
    checkpoint[ENTRY] = {
        "version": 1,
        "heads": heads,
        "num_modules": learner.num_modules,
        "split_points": list(learner.split_points),
        "streams": learner.streams.save(),
        "batches": learner.batches,
    }


def load(learner: LocalLearner, checkpoint: dict[str, Any]) -> None:
    """Puts back what `save` moved.

    Raises:
        ValueError: The checkpoint is of another partition, or was not written by a LocalLearner
            while there are heads to restore.
    """
    entry = checkpoint.get(ENTRY)
    state = {f"{_PREFIX}{k}": v for k, v in checkpoint["state_dict"].items()}
    mine = {k: v for k, v in learner.state_dict().items() if not k.startswith(_PREFIX)}
    fitting = learner.trainer.state.fn == "fit"
    if entry is None:
        if fitting and learner.num_modules > 1:
            raise ValueError(
                "This checkpoint was written by the plain module, so it has no heads and no "
                "optimizers per local module to go on with: load its weights into the module "
                "(load_from_checkpoint) and wrap that in a new LocalLearner."
            )
        heads = mine
    else:
        heads = entry["heads"]
        if not fitting and not mine:
            heads = {}
        elif list(learner.split_points) != entry["split_points"] or set(mine) != set(heads):
            raise ValueError(
                f"This checkpoint has {entry['num_modules']} local modules cut after "
                f"{entry['split_points']} with {len(entry['heads'])} tensors in their heads; the "
                f"learner has {learner.num_modules}, cut after {list(learner.split_points)}, with "
                f"{len(mine)}: use the method of the checkpoint and "
                f"partition={entry['split_points']}."
            )
        learner.batches = entry["batches"]
        if learner.num_modules == entry["num_modules"]:
            learner.streams.load(entry["streams"])
    checkpoint["state_dict"] = {**state, **heads}
