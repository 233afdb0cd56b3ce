"""LocalLearner around a user's module: equal to plain Lightning with K = 1, hooks, batches."""

import lightning as L
import pytest
import torch
from simple import CLASSES, Lit, data, fit, greedy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_local import LocalLearner, LocalSummary, Partition, couplings, heads, methods


def test_one_module_equals_plain_lightning_bit_for_bit(quiet):
    L.seed_everything(1, verbose=False)
    plain = Lit()
    L.seed_everything(1, verbose=False)
    wrapped = Lit()
    a = fit(plain, quiet)
    b = fit(LocalLearner(wrapped, "EndToEnd"), quiet)
    assert plain.state_dict().keys() == wrapped.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, wrapped.state_dict()[name]), name
    assert a.global_step == b.global_step == 9
    assert a.callback_metrics.keys() == b.callback_metrics.keys()
    for name, value in a.callback_metrics.items():
        assert torch.equal(value, b.callback_metrics[name]), name


def test_local_training_learns_and_repeats(quiet):
    runs = []
    for _ in range(2):
        L.seed_everything(1, verbose=False)
        learner = greedy(Lit())
        before = {k: v.clone() for k, v in learner.module.state_dict().items()}
        fit(learner, quiet)
        runs.append(learner.state_dict())
        trained = dict(learner.module.named_parameters())
        assert all(not torch.equal(before[k], v) for k, v in trained.items())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_the_users_module_is_left_clean(quiet):
    learner = greedy(Lit())
    names = set(vars(learner.module))
    fit(learner, quiet, epochs=1)
    assert set(vars(learner.module)) - names <= {"_fabric", "_trainer", "_hparams"}
    assert "forward" not in vars(learner.network)


def test_it_is_left_clean_after_an_exception_too(quiet):
    class Raises(Lit):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            raise RuntimeError("mine")

    learner = greedy(Raises())
    trainer = L.Trainer(max_epochs=1, gradient_clip_val=0.5, accumulate_grad_batches=2, **quiet)
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(learner, data(), data(shuffle=False))
    assert "log" not in vars(learner.module)
    assert (trainer.gradient_clip_val, trainer.accumulate_grad_batches) == (0.5, 2)


def test_each_hook_of_the_user_runs_as_often_as_in_the_plain_run(quiet):
    hooks = [
        *("setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end"),
        *("on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start"),
        *("on_train_batch_end", "on_validation_epoch_end", "on_after_batch_transfer"),
        *("configure_callbacks", "on_before_batch_transfer", "on_validation_start"),
    ]
    counts = []
    for wrap in (lambda module: module, greedy):
        calls = dict.fromkeys(hooks, 0)

        class Counting(Lit):
            example_input_array = torch.zeros(2, 1, 6, 6)

        def counted(name, calls=calls):
            def hook(self, *args, **kwargs):
                calls[name] += 1
                return getattr(L.LightningModule, name)(self, *args, **kwargs)

            return hook

        for name in hooks:
            setattr(Counting, name, counted(name))
        fit(wrap(Counting()), quiet, epochs=2)
        counts.append(calls)
    assert counts[0] == counts[1]
    assert min(counts[0].values()) > 0


def test_an_augmentation_in_the_transfer_hook_reaches_every_module(quiet):
    class Augments(Lit):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return x.flip(-1), y

    fit(greedy(Augments()), quiet, epochs=1)


def test_a_dict_batch_and_a_dict_result(quiet):
    class Dicts(Lit):
        def training_step(self, batch, batch_idx):
            loss = functional.cross_entropy(self(batch["image"]), batch["label"])
            return {"loss": loss, "extra": 1}

        def validation_step(self, batch, batch_idx):
            pass

    pairs = [{"image": x, "label": y} for x, y in data().dataset]
    learner = greedy(Dicts())
    L.Trainer(max_epochs=1, **quiet).fit(learner, DataLoader(pairs, 16), DataLoader(pairs, 16))
    assert learner.num_modules == 4


def test_parameters_outside_the_network_belong_to_the_last_module(quiet):
    class Extra(Lit):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            x, y = batch
            return functional.cross_entropy(self(x) * self.scale, y)

    learner = greedy(Extra(), network="network")
    fit(learner, quiet, epochs=1)
    bodies, _ = learner.parameters_per_module()
    assert learner.module.scale is bodies[-1][-1]
    assert learner.module.scale.item() != 1.0


def test_the_modules_own_forward_can_be_cut(quiet):
    class Direct(Lit):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.a, self.b, self.c = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))

    learner = greedy(Direct())
    assert learner.network_name == "."
    fit(learner, quiet, epochs=1)
    assert (learner.num_modules, learner.split_points) == (3, ("a", "b"))


@pytest.mark.parametrize("size", [1, 13])
def test_a_ragged_batch_of_one_sample_trains(size, quiet):
    learner = LocalLearner(Lit(), methods.Greedy(head=heads.Conv()))
    fit(learner, quiet, epochs=1, loader=data(n=13 + size if size == 1 else 13, size=13))


def test_partition_forms_and_head_accuracy(quiet):
    summary = LocalSummary(head_accuracy=True)
    learner = greedy(Lit(), partition=Partition(split_points=["blocks.0"]))
    trainer = fit(learner, quiet, epochs=1, callbacks=[summary])
    assert learner.num_modules == len(summary.accuracies) == 2
    names = {k for k in trainer.callback_metrics if k.startswith("local/")}
    assert names == {
        *(f"local/0{k}/{what}_epoch" for k in (0, 1) for what in ("loss", "accuracy")),
        *(f"local/0{k}/val_accuracy" for k in (0, 1)),
    }
    x, y = data().dataset.tensors
    learner.eval()
    expected = (learner(x).argmax(1) == y).double().mean()
    assert summary.accuracies[-1] == pytest.approx(float(expected))


def test_local_losses_are_logged_and_are_the_losses(tmp_path, quiet):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    learner = LocalLearner(
        Lit(), methods.LocalMethod(heads.Linear(), coupling=couplings.GradientReconciliation(0.1))
    )
    fit(learner, quiet, epochs=2, logger=logger, log_every_n_steps=1)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    rows = [
        dict(zip(text.split("\n")[0].split(","), r.split(","), strict=False))
        for r in text.split("\n")[1:]
    ]
    steps = [row for row in rows if row.get("local/03/loss")]
    assert len(steps) == 6
    for row in steps:
        assert float(row["local/03/loss"]) == pytest.approx(float(row["train/loss_step"]), 1e-5)
        assert float(row["local/01/reconciliation"]) > 0
        assert "local/00/reconciliation" not in row
