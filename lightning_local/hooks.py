"""The user's hooks: which modules can be wrapped, and how their hooks go on working."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_local.evaluation import AtLastStage, BatchStart
from lightning_local.wrapper import Wrapper

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = [
    "HOOKS",
    "call_hook",
    "check_callbacks",
    "check_module",
    "check_trainer",
    "forward_hooks",
]

# Hooks that go to the user's module as they are; those the learner has work of its own in are
# called from there.
HOOKS = (
    "prepare_data",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_fit_start",
    "on_fit_end",
    "on_train_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_validation_model_zero_grad",
    "on_test_start",
    "on_test_end",
    "on_test_epoch_start",
    "on_test_epoch_end",
    "on_test_batch_start",
    "on_test_batch_end",
    "on_test_model_eval",
    "on_test_model_train",
    "on_predict_start",
    "on_predict_end",
    "on_predict_epoch_start",
    "on_predict_epoch_end",
    "on_predict_batch_start",
    "on_predict_batch_end",
    "on_predict_model_eval",
    "on_predict_model_train",
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
    "lr_scheduler_step",
    "test_step",
    "predict_step",
)
# Those that look at what steps have made: outputs, and what the user's module keeps of them. With
# several stages they run where the steps do, all others on every stage.
_AFTER_STEPS = {
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_test_batch_end",
    "on_test_epoch_end",
    "on_predict_batch_end",
    "on_predict_epoch_end",
}
_REFUSED = {
    "optimizer_step": "steps are made per local module; use on_before_optimizer_step",
    "configure_gradient_clipping": "use the Trainer's gradient_clip_val, gradient_clip_algorithm",
    "backward": "backwards are run per local module; use on_after_backward",
    "optimizer_zero_grad": "gradients are zeroed per local module right after their step",
}


_INSTEAD = "strategy=LocalParallelStrategy(num_stages=1, data_parallel={})"
_REFUSED_CALLBACKS: dict[type[pl.Callback], str] = {
    pl_callbacks.LearningRateFinder: "it drives one optimizer and every local module has its own; "
    "find the rate with the plain module, then wrap that",
    pl_callbacks.StochasticWeightAveraging: "it replaces the schedule of one optimizer and every "
    "local module has its own; use EMAWeightAveraging or WeightAveraging",
    pl_callbacks.BaseFinetuning: "it adds what it thaws to every optimizer, and there is one per "
    "local module; freeze with requires_grad_(False) in the module, and thaw in its "
    "on_train_epoch_start: optimizers hold frozen parameters too",
    pl_callbacks.GradientAccumulationScheduler: "it changes the accumulation of automatic "
    "optimization; use Trainer(accumulate_grad_batches=...), one number for the whole fit",
}


def check_callbacks(callbacks: Iterable[pl.Callback]) -> None:
    """Refuses callbacks of Lightning's that can't work with an optimizer per local module.

    Args:
        callbacks: The Trainer's.

    Raises:
        ValueError: Names the callback, the reason and what to do instead.
    """
    for callback in callbacks:
        for kind, reason in _REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise ValueError(
                    f"{type(callback).__name__} does not work with LocalLearner: {reason}."
                )


def check_module(module: Any) -> None:
    """Refuses what can't be wrapped.

    Raises:
        TypeError: Not a `lightning.pytorch.LightningModule`, or a learner.
        ValueError: It optimizes by hand, or overrides a hook that local learning replaces.
    """
    if not isinstance(module, pl.LightningModule):
        kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
        if any(kind.startswith("pytorch_lightning.") for kind in kinds):
            raise TypeError(
                f"{type(module).__name__} is a pytorch_lightning module, and its package's classes "
                "don't mix with those of lightning.pytorch: write `import lightning as L` and "
                "subclass L.LightningModule."
            )
        raise TypeError(
            f"LocalLearner(module=...) got a {type(module).__name__}: pass a "
            "lightning.pytorch.LightningModule, whose training_step, optimizers and metrics are "
            "used as they are."
        )
    if isinstance(module, Wrapper):
        raise TypeError(
            f"LocalLearner(module=...) got a {type(module).__name__}, which is a learner already: "
            "use it as it is, or pass the module inside, learner.module, to wrap that in another "
            "way."
        )
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} sets automatic_optimization = False, so its training_step "
            "runs its own backward and can't be cut: wrap a module with automatic optimization."
        )
    for hook, remedy in _REFUSED.items():
        if is_overridden(hook, module):
            raise ValueError(f"{type(module).__name__} overrides {hook}: {remedy}.")
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"training_step of {type(module).__name__} takes dataloader_iter; local modules need "
            "the batch: take (batch, batch_idx)."
        )


def check_trainer(trainer: pl.Trainer) -> bool:
    """Refuses strategies under which the updates would be wrong or part ways.

    Returns:
        Whether the strategy links local modules by itself.

    Raises:
        ValueError: More than one process, a strategy that owns the optimizer, or a compiled
            learner.
    """
    if getattr(trainer.lightning_module, "_compiler_ctx", None) is not None:
        raise ValueError(
            "torch.compile(learner) can't compile a step that runs a backward per local module: "
            "pass LocalLearner(compile=True), which compiles each body and head."
        )
    strategy = type(trainer.strategy).__name__
    if getattr(trainer.strategy, "serves_local_modules", False):
        return True
    if trainer.world_size > 1 or strategy not in (
        "SingleDeviceStrategy",
        "SingleDeviceXLAStrategy",
    ):
        raise ValueError(
            f"LocalLearner runs backward and step per local module, which {strategy} on "
            f"{trainer.world_size} processes does not expect: pass Trainer(devices=1), without a "
            f"strategy, or {_INSTEAD.format(trainer.world_size)}."
        )
    return False


def forward_hooks(learner: LocalLearner, module: pl.LightningModule) -> None:
    """Lets the learner answer with the user's hooks; what the user lacks stays "not overridden"."""
    for hook in HOOKS:
        if not is_overridden(hook, module):
            continue
        if hook in _AFTER_STEPS:
            setattr(learner, hook, AtLastStage(learner, hook))
        elif hook == "on_train_batch_start":
            setattr(learner, hook, BatchStart(learner))
        else:
            setattr(learner, hook, getattr(module, hook))


def call_hook(module: pl.LightningModule, hook: str, *args: Any) -> Any:
    """Calls a hook of the user's module if there is one of its own."""
    return getattr(module, hook)(*args) if is_overridden(hook, module) else None
