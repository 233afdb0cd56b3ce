"""LocalLearner around a user's module: equal to plain Lightning with K = 1, errors that help."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_local import LocalLearner, LocalSummary, Partition, couplings, heads, methods

CLASSES = 4


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return functional.relu(x + self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self, blocks=3, width=6):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = functional.dropout(self.stem(x), 0.1, self.training)
        return self.fc(self.blocks(x).mean((2, 3)))


class Lit(L.LightningModule):
    def __init__(self, network=None):
        super().__init__()
        self.network = network or Net()
        self.seen = []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self(x), y, label_smoothing=0.1)
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def data(shuffle=True, n=40, size=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), size, shuffle=shuffle)


def fit(module, quiet, epochs=3, loader=None, **options):
    L.seed_everything(7, verbose=False)
    trainer = L.Trainer(max_epochs=epochs, **{**quiet, **options})
    trainer.fit(module, loader or data(), data(shuffle=False))
    return trainer


def greedy(module, **options):
    return LocalLearner(module, methods.Greedy(), **options)


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
    assert set(vars(learner.module)) - names <= {"_fabric", "_trainer"}
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


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda self, b, i: self.loss(self(b[0] + 1.0), b[1]), "another input than the batch's"),
        (lambda self, b, i: self.loss(self(b[0]) + self(b[0]), b[1]), "called the network twice"),
        (lambda self, b, i: self.fixed.sum(), "did not call the network"),
        (lambda self, b, i: self(b[0]) and None, "without a loss tensor"),
        (lambda self, b, i: self(b[0]).mean(0), "return a scalar"),
    ],
)
def test_a_step_that_hides_something_is_refused(step, words, quiet):
    class Odd(Lit):
        def __init__(self):
            super().__init__()
            self.fixed = nn.Parameter(torch.zeros(1))

        def loss(self, output, y):
            return functional.cross_entropy(output, y)

        def training_step(self, batch, batch_idx):
            if words == "without a loss tensor":
                self(batch[0])
                return None
            return step(self, batch, batch_idx)

    with pytest.raises(ValueError, match=words):
        fit(greedy(Odd(), network="network"), quiet)


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


def test_a_batch_that_cannot_be_unpacked_is_named(quiet):
    triples = [(x, y, y) for x, y in data().dataset]
    with pytest.raises(ValueError, match="The batch is a list of 3"):
        fit(greedy(Lit()), quiet, loader=DataLoader(triples, 16))
    learner = greedy(Lit(), unpack=lambda batch: (batch[0], batch[1]))

    def step(batch, batch_idx):
        return functional.cross_entropy(learner.module(batch[0]), batch[1])

    learner.module.training_step = step
    fit(learner, quiet, epochs=1, loader=DataLoader(triples, 16))
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


def test_ambiguous_networks_list_the_choices():
    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.other = Net()

    with pytest.raises(ValueError, match="network='network' or 'other'"):
        greedy(Two())
    assert greedy(Two(), network="other").network_name == "other"
    with pytest.raises(ValueError, match="network='netwrok' is no submodule"):
        greedy(Two(), network="netwrok")


def test_modules_that_cannot_be_wrapped():
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class Steps(Lit):
        def optimizer_step(self, *args, **kwargs):
            pass

    with pytest.raises(ValueError, match="automatic_optimization = False"):
        greedy(Manual())
    with pytest.raises(ValueError, match="overrides optimizer_step"):
        greedy(Steps())
    with pytest.raises(TypeError, match="got a Net: pass a"):
        greedy(Net())

    foreign = type("LightningModule", (), {"__module__": "pytorch_lightning.core.module"})
    with pytest.raises(TypeError, match="is a pytorch_lightning module"):
        LocalLearner(type("Mine", (foreign,), {})(), "Greedy")


def test_arguments_are_checked_when_they_arrive():
    for arguments, words in [
        ({"method": "auglocl"}, "Did you mean 'AugLocal'"),
        ({"method": 3}, "pass one of"),
        ({"method": "EndToEnd", "partition": 2}, "trains the network as one module"),
        ({"partition": "blocks"}, "partition='blocks' is not known"),
        ({"partition": 0}, "1 .end to end. or more"),
        ({"partition": ["stm"]}, "closest names are: stem"),
        ({"out_features": 0}, "heads need 1 or more"),
        ({"lr_scheduler": torch.optim.lr_scheduler.StepLR}, "needs optimizer"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words):
            LocalLearner(Lit(), **arguments)


def test_more_modules_than_units_is_an_error_that_counts(quiet):
    with pytest.raises(ValueError, match="asks for 9 local modules, but `network` has 4 units"):
        fit(greedy(Lit(), partition=9), quiet)


def test_a_coupling_without_a_boundary_warns():
    with pytest.warns(UserWarning, match="BackwardLink has no effect with one local module"):
        LocalLearner(Lit(), "BackLink", partition=1)


def test_several_optimizers_are_refused(quiet):
    class Several(Lit):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

    with pytest.raises(ValueError, match="returned 2 optimizers"):
        fit(greedy(Several()), quiet)


def test_a_nan_loss_is_named_by_module_and_batch(quiet):
    class Bad(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.network.blocks[1].conv.weight.data.fill_(float("nan"))

    with pytest.raises(
        FloatingPointError, match="local module 2 of 4 was NaN or infinite in batch 1"
    ):
        fit(greedy(Bad()), quiet, log_every_n_steps=1)


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


def test_a_network_of_one_unit_says_that_nothing_is_local(quiet):
    class One(Lit):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)))

    learner = greedy(One(), network="network")
    with pytest.warns(UserWarning, match="`network` has one unit, so it is trained end to end"):
        fit(learner, quiet, epochs=1)
    assert learner.num_modules == 1
