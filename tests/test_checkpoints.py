"""Checkpoints: the user's files, resuming, and the evaluation that loads them."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from simple import Lit, data, run, wrap

from lightning_local import LocalLearner, methods


def test_checkpoint_files_and_the_plain_class(tmp_path, quiet):
    class Saved(Lit):
        def __init__(self, width=6):
            super().__init__()
            self.save_hyperparameters()

    names = []
    for folder, make in (("plain", lambda module: module), ("local", wrap("units"))):
        checkpoint = ModelCheckpoint(
            tmp_path / folder, filename="{step}", every_n_train_steps=2, save_top_k=-1
        )
        options = {**quiet, "enable_checkpointing": True}
        _, model = run(make, options, Saved, callbacks=[checkpoint])
        names.append(sorted(path.name for path in (tmp_path / folder).iterdir()))
    assert names[0] == names[1] == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    loaded = Saved.load_from_checkpoint(tmp_path / "local" / "step=6.ckpt", width=9)
    assert loaded.hparams.width == 9
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("method", ["Greedy", "BackLink", "SGR", "AugLocal"])
def test_resuming_at_an_epochs_end_equals_the_uninterrupted_run(method, tmp_path, quiet):
    class Steady(Lit):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def make(module):
        return LocalLearner(module, methods.AugLocal(depth=1) if method == "AugLocal" else method)

    def loader():
        return data(shuffle=False)

    _, whole = run(make, quiet, Steady, epochs=3, loader=loader())
    trainer, _ = run(make, quiet, Steady, epochs=1, loader=loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    L.seed_everything(99, verbose=False)
    resumed = make(Steady())
    trainer = L.Trainer(max_epochs=3, **quiet)
    trainer.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert trainer.global_step == 9
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_checkpoint_of_another_partition_is_refused(tmp_path, quiet):
    trainer, _ = run(wrap(2), quiet, epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="partition=\\['blocks.0'\\]"):
        L.Trainer(max_epochs=2, **quiet).fit(
            wrap("units")(Lit()), data(), data(), ckpt_path=tmp_path / "a.ckpt"
        )
    trainer, _ = run(lambda module: module, quiet, epochs=1)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="written by the plain module"):
        L.Trainer(max_epochs=2, **quiet).fit(
            wrap(2)(Lit()), data(), data(), ckpt_path=tmp_path / "b.ckpt"
        )


def test_validate_test_and_predict_are_the_users(tmp_path, quiet):
    class Steps(Lit):
        def test_step(self, batch, batch_idx):
            self.log("test/size", float(len(batch[0])), reduce_fx="sum")

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    trainer, learner = run(wrap("units"), quiet, Steps, epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = wrap("units")(Steps())
    trainer = L.Trainer(**quiet)
    expected = L.Trainer(**quiet).validate(learner.module, data(shuffle=False), verbose=False)
    found = trainer.validate(
        fresh, data(shuffle=False), ckpt_path=tmp_path / "a.ckpt", verbose=False
    )
    assert found == expected
    assert trainer.test(fresh, data(shuffle=False), verbose=False)[0]["test/size"] > 0
    outputs = torch.cat(trainer.predict(fresh, data(shuffle=False)))
    learner.eval()
    assert torch.equal(outputs, torch.cat([learner(x) for x, _ in data(shuffle=False)]))
