"""Features of Lightning that can't work with local modules say why, and what to do instead."""

import lightning as L
import pytest
from lightning.pytorch import callbacks as cbs
from lightning.pytorch.tuner import Tuner
from simple import Lit, data, run, wrap

REFUSED = {
    cbs.LearningRateFinder: ({}, r"LearningRateFinder does not work .* find the rate with the pl"),
    cbs.StochasticWeightAveraging: ({"swa_lrs": 0.1}, r"replaces .* use EMAWeightAveraging"),
    cbs.GradientAccumulationScheduler: (
        {"scheduling": {0: 2}},
        r"use Trainer\(accumulate_grad_batches=",
    ),
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_is_refused_says_why_and_what_to_do(kind, quiet):
    arguments, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        run(wrap("units"), quiet, callbacks=[kind(**arguments)])


def test_the_tuner(quiet):
    class Batches(Lit):
        def __init__(self, batch_size=2):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return data(size=self.hparams.batch_size)

        def val_dataloader(self):
            return data(shuffle=False)

    L.seed_everything(3, verbose=False)
    learner = wrap("units")(Batches())
    trainer = L.Trainer(max_epochs=1, **quiet)
    found = Tuner(trainer).scale_batch_size(learner, max_trials=2, steps_per_trial=1)
    assert found == learner.module.hparams.batch_size == 4
    trainer.fit(learner)
    assert trainer.global_step == 10
    with pytest.raises(ValueError, match="LearningRateFinder does not work with LocalLearner"):
        Tuner(L.Trainer(max_epochs=1, **quiet)).lr_find(wrap("units")(Lit()), data())
