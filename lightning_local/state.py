"""What a checkpoint holds, and how it comes back.

The file is the user's: it loads in their plain class. Heads, split points, scalers and random
states live under one extra key, as plain types and tensors, so that `weights_only=True` loads it.
Everything is checked before the first tensor changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_local.randomness import global_states, set_global_states

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["ENTRY", "Resumed", "load", "save"]

ENTRY = "lightning_local"
_VERSION = 1
_PREFIX = "module."
_HPARAMS = (
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY,
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_NAME,
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE,
)


@dataclasses.dataclass
class Resumed:
    """What a checkpoint brought that is put in place once the training loop starts.

    Attributes:
        scalers: States of the K loss scalers; empty without fp16.
        plateau: Metrics for the schedulers that were about to step.
        monitored: The newest values of all metrics that schedulers wait for.
        random: States of the process's generators.
        mid_epoch: Whether the run was saved within an epoch.
    """

    scalers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    plateau: dict[str, float] = dataclasses.field(default_factory=dict)
    monitored: dict[str, float] = dataclasses.field(default_factory=dict)
    random: dict[str, Any] | None = None
    mid_epoch: bool = False


def save(learner: LocalLearner, checkpoint: dict[str, Any]) -> bool:
    """Turns the learner's checkpoint into one of the user's module.

    Returns:
        Whether this is the process that writes it; the others have given it their parts.
    """
    parts = learner.links.gather(_part(learner))
    if parts is None:
        return False
    replicas = [
        _of_all_stages(learner, [stage[d] for stage in parts]) for d in range(len(parts[0]))
    ]
    state = checkpoint["state_dict"]
    # The user's module says which keys there are; an average of the weights says with which values.
    own = {k: state.get(_PREFIX + k, v) for k, v in learner.module.state_dict().items()}
    heads = {k: v for k, v in state.items() if not k.startswith(_PREFIX)}
    checkpoint["state_dict"] = own
    for key in _HPARAMS:
        checkpoint.pop(key, None)
    module: Any = learner.module
    if module.hparams:
        if hasattr(module, "_hparams_name"):
            checkpoint[module.CHECKPOINT_HYPER_PARAMS_NAME] = module._hparams_name
        # A LightningCLI in subclass mode would build what it finds under the usual key, without the
        # learner around it; the older one is read by load_from_checkpoint alone.
        usual = module.CHECKPOINT_HYPER_PARAMS_KEY
        key = CHECKPOINT_PAST_HPARAMS_KEYS[-1] if learner.made_by_cli else usual
        checkpoint[key] = dict(module.hparams)
    boundaries = learner.cutting.boundaries if learner.cutting is not None else ()
    checkpoint[ENTRY] = {
        "version": _VERSION,
        "method": _pieces(learner),
        "heads": heads,
        "num_modules": learner.num_modules,
        "split_points": list(learner.split_points),
        "boundaries": [list(form.shape) for form in boundaries],
        "streams": replicas[0]["streams"],
        "random": replicas[0]["random"],
        # Of further data-parallel replicas.
        "replicas": [{name: r[name] for name in ("streams", "random")} for r in replicas[1:]],
        "batches": learner.batches,
        # Lightning's counter, by the rule with which it ends an epoch.
        "mid_epoch": not learner.trainer.fit_loop.epoch_loop._num_ready_batches_reached(),
        "scalers": replicas[0]["scalers"],
        "plateau": learner.loop.schedules.save() if learner.loop else {},
        "monitored": learner.loop.schedules.known() if learner.loop else {},
    }
    checkpoint.update(replicas[0]["datamodule"])
    if replicas[0]["loader"] is not None:
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = replicas[0]["loader"]
    return True


def _part(learner: LocalLearner) -> dict[str, Any]:
    """What only this process knows."""
    owned = learner.links.owned(learner.num_modules)
    loader = learner.trainer.fit_loop.state_dict()["state_dict"].get("combined_loader")
    return {
        "owned": (owned.start, owned.stop),
        "streams": learner.streams.save(),
        "scalers": learner.loop.scalers.save() if learner.loop else [],
        "random": global_states(),
        "loader": loader,
        "datamodule": _of_datamodule(learner),
    }


def _of_datamodule(learner: LocalLearner) -> dict[str, Any]:
    """What a datamodule remembers of reading, where the data are read by another process."""
    # Lightning's connectors set it, out of mypy's sight.
    datamodule: Any = learner.trainer.datamodule  # type: ignore[attr-defined]
    if learner.links.alone or not learner.links.first or datamodule is None:
        return {}
    state: dict[str, Any] = datamodule.state_dict()
    return {datamodule.__class__.__qualname__: state} if state else {}


def _of_all_stages(learner: LocalLearner, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One replica's parts as they were in one process: the first stage reads the data."""
    owners = [part for part in parts for _ in range(*part["owned"])]
    assert len(owners) == learner.num_modules or not learner.num_modules
    streams = {
        kind: [part["streams"][kind][k] for k, part in enumerate(owners)]
        for kind in ("cpu", "cuda")
    }
    scalers = [part["scalers"][k] for k, part in enumerate(owners) if part["scalers"]]
    first = parts[0]
    return {
        "streams": streams,
        "scalers": scalers,
        "random": first["random"],
        "loader": first["loader"],
        "datamodule": first["datamodule"],
    }


def load(learner: LocalLearner, checkpoint: dict[str, Any]) -> None:
    """Puts back what `save` moved; nothing of the learner changes if the checkpoint is refused.

    Raises:
        ValueError: The checkpoint is of another network or method, or was not written by a
            LocalLearner while there are heads to restore.
    """
    entry = checkpoint.get(ENTRY)
    fitting = learner.trainer.state.fn == "fit"
    state = {f"{_PREFIX}{k}": v for k, v in checkpoint["state_dict"].items()}
    _check_tensors(learner, state)
    if entry is None:
        if fitting and learner.num_modules > 1:
            raise ValueError(
                "This checkpoint was written by the plain module, so it has no heads and no "
                "optimizers per local module to go on with: load its weights into the module "
                "(load_from_checkpoint) and wrap that in a new LocalLearner."
            )
        checkpoint["state_dict"] = {**state, **_heads(learner)}
        return
    if entry["version"] > _VERSION:
        raise ValueError(
            f"This checkpoint was written in version {entry['version']} of lightning_local's "
            f"format, and this release reads up to {_VERSION}: install a newer one."
        )
    heads = entry["heads"]
    if fitting or learner.cutting is not None:
        _check_method(learner, entry)
        _take_split_points(learner, entry)
        _check_heads(learner, entry)
    else:
        heads = {}
    if fitting:
        learner.batches = entry["batches"]
        mine, others = entry, entry.get("replicas", [])
        if 0 < learner.links.replica <= len(others):
            mine = others[learner.links.replica - 1]
        if learner.links.replica <= len(others):
            learner.streams.load(mine["streams"])
        waiting = entry["plateau"], entry.get("monitored", {})
        learner.resumed = Resumed(entry["scalers"], *waiting, mine["random"], entry["mid_epoch"])
        if not entry["mid_epoch"]:
            _set_before_shuffling(learner, mine["random"])
        if not learner.links.first:
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
    checkpoint["state_dict"] = {**state, **heads}


def _heads(learner: LocalLearner) -> dict[str, torch.Tensor]:
    return {k: v for k, v in learner.state_dict().items() if not k.startswith(_PREFIX)}


def _pieces(learner: LocalLearner) -> str:
    method = learner.method
    names = [type(piece).__name__ for piece in (method.head, method.loss, method.coupling)]
    return " x ".join(names) if method.head is not None else "EndToEnd"


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What is wrong with `found`, in words; empty if nothing is."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    shapes = [
        f"{name} ({tuple(found[name].shape)}, not {tuple(tensor.shape)})"
        for name, tensor in expected.items()
        if isinstance(tensor, torch.Tensor)
        and isinstance(found.get(name), torch.Tensor)
        and found[name].shape != tensor.shape
    ]
    parts = (("lacks", missing), ("has also", unknown), ("has other shapes:", shapes))
    said = [
        f"{verb} {', '.join(n.removeprefix(_PREFIX) for n in names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for verb, names in parts
        if names
    ]
    return "; it ".join(said)


def _check_tensors(learner: LocalLearner, state: Mapping[str, Any]) -> None:
    if not learner.strict_loading:
        return
    mine = {f"{_PREFIX}{k}": v for k, v in learner.module.state_dict().items()}
    wrong = _differences(mine, state)
    if wrong:
        raise ValueError(
            f"This checkpoint is of another network than this {type(learner.module).__name__}: it "
            f"{wrong}. Build the module as it was when the file was written. Or wrap one with what "
            "fits: own = module.state_dict(); module.load_state_dict({k: v for k, v in torch.load("
            "path)['state_dict'].items() if k in own and v.shape == own[k].shape}, strict=False)."
        )


def _check_method(learner: LocalLearner, entry: Mapping[str, Any]) -> None:
    mine = _pieces(learner)
    if mine != entry["method"]:
        raise ValueError(
            f"This checkpoint was trained with the method {entry['method']} (head x loss x "
            f"coupling), and the learner has {mine}: use the method of the checkpoint, or load its "
            "weights into the module (load_from_checkpoint) and wrap that in a new LocalLearner."
        )


def _take_split_points(learner: LocalLearner, entry: Mapping[str, Any]) -> None:
    """The checkpoint's cuts win, since its heads and optimizers belong to them."""
    points = entry["split_points"]
    if list(learner.split_points) == points:
        return
    if learner.num_modules == 1 or not points:
        raise ValueError(
            f"This checkpoint has {entry['num_modules']} local modules cut after {points}, and the "
            f"learner has {learner.num_modules}: pass partition={points or 1}."
        )
    rank_zero_warn(
        f"The checkpoint's {entry['num_modules']} local modules, cut after {points}, are used, not "
        f"the {learner.num_modules} that partition={learner.partition} gives: its heads and "
        "optimizers belong to them."
    )
    request = dataclasses.replace(
        learner.partition, num_modules=None, split_points=points, balance="units"
    )
    learner.build(*learner.examples(), partition=request)


def _check_heads(learner: LocalLearner, entry: Mapping[str, Any]) -> None:
    wrong = _differences(_heads(learner), entry["heads"])
    if wrong:
        raise ValueError(
            f"This checkpoint's {len(entry['heads'])} tensors of heads are not those of the "
            f"learner's {_pieces(learner)}: it {wrong}. Give the method the arguments that it was "
            "trained with."
        )


def _set_before_shuffling(learner: LocalLearner, states: dict[str, Any]) -> None:
    """Sets the generators once the user's code has made the training loader.

    At an epoch's end the next draw of the uninterrupted run is the training iterator's.
    """
    # Lightning's own object behind every way to give training data; asked once per fit.
    source: Any = learner.trainer.fit_loop._data_source
    make = source.dataloader

    def dataloader() -> Any:
        source.__dict__.pop("dataloader", None)
        loader = make()
        set_global_states(states)
        return loader

    source.dataloader = dataloader
