"""Every hook of Lightning either goes to the user's module or is called by the learner."""

import inspect

import lightning as L
from lightning.pytorch.core import hooks as lightning_hooks

from lightning_local import LocalLearner
from lightning_local.hooks import HOOKS

OWN = {
    "configure_model",
    "on_before_optimizer_step",
    "on_load_checkpoint",
    "on_save_checkpoint",
    "on_train_epoch_end",
    "on_train_epoch_start",
    "on_train_start",
    "setup",
    "teardown",
}
REPLACED_BY_CONFIGURE_MODEL = {"configure_sharded_model"}


def test_no_hook_of_lightning_is_forgotten():
    kinds = (
        lightning_hooks.ModelHooks,
        lightning_hooks.DataHooks,
        lightning_hooks.CheckpointHooks,
    )
    names = {name for kind in kinds for name in vars(kind) if not name.startswith("_")}
    assert names - set(HOOKS) - REPLACED_BY_CONFIGURE_MODEL == OWN


def test_hooks_of_the_learner_call_the_users():
    for name in OWN:
        source = inspect.getsource(getattr(LocalLearner, name))
        assert f'"{name}"' in source, name


def test_what_the_user_lacks_stays_not_overridden():
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.utilities.model_helpers import is_overridden

    class Mine(BoringModel):
        def on_train_end(self):
            """Mine."""

    learner = LocalLearner(Mine(), "EndToEnd")
    assert is_overridden("on_train_end", learner)
    assert is_overridden("train_dataloader", learner)
    for name in ("on_train_batch_start", "predict_dataloader", "on_test_epoch_end"):
        assert is_overridden(name, Mine()) == is_overridden(name, learner), name
    assert isinstance(learner, L.LightningModule)
