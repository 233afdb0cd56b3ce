"""LightningModules as users write them: plain, as one module, and cut, with the same outcome."""

from collections import Counter
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from simple import CLASSES, Block, Lit, Net, data
from torch import nn, optim
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy as Accuracy
from users import Mine, X, Y, fit, greedy, mine, note, runs

from lightning_local import LocalLearner


def beside(width=6, maps=False, **members):
    members["forward"] = lambda self, x: self.classifier(self.backbone(x))
    module, net = mine(**members)(nn.Identity()), Net()
    net.fc = nn.Linear(6, width)
    module.backbone = nn.Sequential(net.stem, Block(6), Block(6)) if maps else net
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if maps else []
    module.classifier = nn.Sequential(*pool, nn.Linear(width, CLASSES))
    return module


def returns(form, pick):
    network = type("Returns", (Net,), {"forward": lambda self, x: form(Net.forward(self, x))})
    return lambda: mine(forward=lambda self, x: pick(self.network(x)))(network())


def flat(frozen=False, **members):
    forward = {"forward": lambda self, x: self.network(x.flatten(1))}
    layers = [nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)]
    layers[-1].requires_grad_(not frozen)
    return mine(**forward, **members)(nn.Sequential(*layers))


def pretrained(*frozen, bn=True):
    def unmoved(self):
        now = self.state_dict()
        return str([n for n in now if torch.equal(now[n], self.before[n])]), self.network.training

    module = mine(
        train=lambda self, mode=True: Lit.train(self, mode).network.blocks.train(bn) and self,
        on_train_epoch_start=lambda self: self.network.stem.requires_grad_(self.current_epoch == 1),
        on_train_epoch_end=note(unmoved),
    )()
    module.network.load_state_dict(Net().state_dict())
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    module.before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return module.train()


def by_name(self):
    named = dict(self.network.named_parameters())
    weight, bias = named.pop("fc.weight"), {"params": named.pop("fc.bias"), "weight_decay": 0.0}
    return optim.AdamW([{"params": named.values(), "lr": 0.01}, {"params": weight}, bias], 0.02)


def of_each(self):
    groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return str([(name, found[id(p)]) for name, p in self.named_parameters()])


HOOKS = {
    "example_input_array": X[:3],
    "on_before_batch_transfer": lambda self, b, i: {"image": b[0], "label": b[1]},
    "transfer_batch_to_device": lambda self, b, device, i: self.seen.append(f"to {device}") or b,
    "on_after_batch_transfer": lambda self, b, i: ((b["image"] - X.mean()) / X.std(), b["label"]),
    "on_train_batch_start": lambda self, b, i: self.seen.append(self.global_step) or -(i == 1),
    "on_before_optimizer_step": note("K step"), "on_after_backward": note("K backward"),
    "lr_scheduler_step": note(lambda self, scheduler, metric: scheduler.step() or "K rate"),
    "configure_callbacks": lambda self: EarlyStopping("end", patience=1),
    "on_train_epoch_end": note(lambda self: self.log("end", 1.0) or self.print("epoch")
        or (self.current_epoch, self.trainer.optimizers[0].param_groups[0]["lr"])),
    "train_dataloader": lambda self: data(), "val_dataloader": lambda self: data(False),
}  # fmt: skip
NAMED = [{"image": x, "label": y, "id": 0} for x, y in zip(X, Y, strict=True)]
IN_BACKBONE = {"network": "backbone", "out_features": CLASSES}
TO_FLAT = {"unpack": lambda batch: (batch[0].flatten(1), batch[1])}
ONE = {"only_one": True}
SUMS = {"on_train_batch_start": note(lambda self, batch, batch_idx: batch[0].sum().item())}
# Name: the module, arguments of LocalLearner, arguments of `runs`.
FINE = {
    "classifier beside": (partial(beside, 3, on_train_end=note(of_each)), IN_BACKBONE),
    "whole forward": (partial(beside, maps=True), {"network": "."}),
    "dict batches": (mine(training_step=lambda self, b: self.loss((b["image"], b["label"]))), {},
                     {"loader": partial(DataLoader, NAMED, 16)}),
    "batches of three": (mine(training_step=lambda self, b, i: self.loss(b[:2]) * b[2].mean()),
        {"unpack": lambda b: b[:2]}, {"loader": partial(DataLoader, TensorDataset(X, Y, X), 16)}),
    "frozen weight": (partial(pretrained, "network.stem.weight"), {"method": "BackLink"}),
    "frozen first module": (partial(pretrained, "network.stem"),),
    "frozen modules": (partial(pretrained, "network.stem", "network.blocks.0"), {"method": "SGR"}),
    "frozen batchnorm": (partial(pretrained, bn=False), {"partition": 2}),
    "groups": (mine(configure_optimizers=by_name, on_train_end=note(of_each)),),
    "hooks": (mine(**HOOKS), {}, {"loader": None, "epochs": 6}),
    "keywords": (mine(forward=lambda self, x: self.network(x=x)),),
    "tuple": (returns(lambda y: (y, 2 * y), lambda out: out[0]), {"out_features": CLASSES}),
    "dict": (returns(lambda y: {"y": y}, lambda out: out["y"]), {"out_features": CLASSES}),
    "criterion": (mine(loss=lambda self, b: mse_loss(self(b[0]), one_hot(b[1], 4).float())),
                  {"criterion": lambda out, y: mse_loss(out, one_hot(y, 4).float())}),
    "setup": (mine(setup=lambda self, stage: setattr(self, "w", nn.Parameter(torch.ones(()))),
                   loss=lambda self, b: cross_entropy(self(b[0]), b[1]) * self.w),),
    "configure_model": (mine(configure_model=lambda self: setattr(
        self, "last", nn.Linear(4, 4)), forward=lambda self, x: self.last(self.network(x))),),
    "input made in forward": (flat, TO_FLAT),
    "fixed classifier": (partial(flat, True), TO_FLAT),
    "dict result": (mine(training_step=lambda self, b: {"loss": self.loss(b), "n": len(b[0])},
                         on_train_batch_end=note(lambda self, out, *_: (*sorted(out), out["n"]))),),
}  # fmt: skip
# What looks easy, and is not.
HARD = {
    "a backbone that returns maps": (partial(beside, maps=True), IN_BACKBONE),
    "network of configure_model": (mine(
        __init__=L.LightningModule.__init__, seen=(),
        configure_model=lambda self: setattr(self, "network", Net())), {"network": "network"}),
    "example goes through forward": (partial(flat, example_input_array=X[:2]), TO_FLAT),
    "example without a forward": (mine(example_input_array=X[:2], forward=L.LightningModule.forward,
        loss=lambda self, b: cross_entropy(self.network(b[0]), b[1]),
        validation_step=lambda self, b: None),),
    "example of keywords": (mine(example_input_array={"x": X[:2]}),),
    "validation_step(batch)": (mine(validation_step=lambda self, batch: None),),
    "on_before_zero_grad": (mine(on_before_zero_grad=note("K zero")),),
    "own log": (mine(log=lambda self, name, value, **kw: Mine.log(self, name * 2, value, **kw)),),
    "LambdaLR with a method": (mine(rate=lambda self, step: 1 / self.trainer.max_epochs,
        configure_optimizers=lambda self: ([o := optim.SGD(self.parameters(), 0.1)],
                                           [optim.lr_scheduler.LambdaLR(o, self.rate)])),),
    "gradients stay till the next batch": (mine(on_train_batch_end=note(
        lambda m, *_: m.network.fc.bias.grad is None)), {}, ONE),
    "loss of a window is divided": (mine(on_train_batch_end=note(
        lambda self, out, *_: out["loss"].item())), {}, {"accumulate_grad_batches": 2} | ONE),
    "None skips a batch of one module": (mine(
        training_step=lambda self, b, i: self.loss(b) if i else None), {}, ONE),
    "callbacks read attributes of the module": (mine(configure_callbacks=lambda self:
        LambdaCallback(on_train_start=lambda trainer, module: module.seen.append(1))),),
    "a loader's own generator": (mine(**SUMS), {}, {"loader": lambda: DataLoader(
        data().dataset, 16, True, generator=torch.Generator().manual_seed(5))}),
    "train_dataloader is called once": (mine(train_dataloader=lambda self: self.seen.append(0)
        or data(), val_dataloader=lambda self: data(False)), {}, {"loader": None}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(returned `None`|provided params|in eval mode):UserWarning")
@pytest.mark.parametrize("case", [*FINE, *HARD])
def test_it_runs_as_the_plain_module(case, quiet, capsys):
    kind, ours, options, *_ = (*(FINE | HARD)[case], {}, {})
    made = runs(kind, quiet, partial(greedy, **ours), **options)
    plain, local = (Counter(module.seen) for _, module in (made[0], made[-1]))
    per_module = len(made[-1][0].optimizers)
    assert local == {w: n * (per_module if "K " in str(w) else 1) for w, n in plain.items()}
    assert capsys.readouterr().out in ("", "epoch\n" * 6)


REFUSED = {
    "several networks": (beside, {}, "network='backbone' or 'classifier', or network='.'"),
    "augmentation": (mine(training_step=lambda self, b: self.loss((b[0].flip(-1), b[1]))), {},
                     "Move the change to on_after_batch_transfer"),
    "two calls": (mine(training_step=lambda self, b: self.loss(b) + self.loss(b)), {}, "twice"),
    "None": (mine(training_step=lambda self, b: self.loss(b) and None), {}, "Skipping a batch"),
    "two optimizers": (mine(configure_optimizers=lambda self: [optim.SGD(self.parameters())] * 2),
                       {}, "returned 2 optimizers"),
    "manual": (mine(automatic_optimization=False), {}, "sets automatic_optimization = False"),
    "tuple": (returns(lambda y: (y, y), lambda out: out[0]), {}, "Pass .*out_features"),
    "step": (mine(optimizer_step=note(0)), {}, "overrides optimizer_step: .* local module"),
    "clipping": (mine(configure_gradient_clipping=note(0)), {}, "use .* gradient_clip_val"),
    "finetuning": (partial(beside, configure_callbacks=lambda self: BackboneFinetuning(
        1, lambda epoch: 2.0)), IN_BACKBONE, "BackboneFinetuning does not work .* thaw in its"),
    "data to be read once": (mine(), {}, "read only once",
                             {"loader": lambda: iter(list(data()))}),
    "augmentation of some batches": (mine(training_step=lambda self, b, i: self.loss(
        (b[0].flip(-1) if i else b[0], b[1]))), {}, "on_after_batch_transfer"),
    "augmentation in place": (mine(training_step=lambda self, b: self.loss((b[0].neg_(), b[1]))),
                              {}, "on_after_batch_transfer"),
    "floats": (mine(loss=lambda self, b: mse_loss(self(b[0]), b[1])), {}, "criterion",
               {"loader": partial(DataLoader, TensorDataset(X, 2.0 * one_hot(Y)), 16)}),
    "classifier in the step": (mine(forward=lambda self, x: self.network(x),
        __init__=lambda self: Mine.__init__(self) or setattr(self, "top", nn.Linear(4, 4)),
        loss=lambda self, b: cross_entropy(self.top(self(b[0])), b[1])),
        {"network": "network"}, "parameters in top too"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_a_remedy(case, quiet):
    kind, ours, words, options, *_ = (*REFUSED[case], {})
    with pytest.raises(ValueError, match=words):
        fit(greedy(kind(), **ours), quiet, **options)


class Measured(Mine):
    def __init__(self):
        super().__init__()
        kinds = {"acc": Accuracy(CLASSES, average="micro"), "top2": Accuracy(CLASSES, top_k=2)}
        self.measures = nn.ModuleList(MetricCollection(kinds).clone(w) for w in ("train/", "val/"))

    def training_step(self, batch):
        self.measures[0](output := self(batch[0]), batch[1])
        self.log_dict(self.measures[0], prog_bar=True, on_step=True, on_epoch=True)
        self.log("loss", loss := cross_entropy(output, batch[1]), batch_size=16, on_epoch=True)
        self.logger.log_metrics({"own": float(self.global_step)}, step=self.global_step)
        return loss

    def validation_step(self, batch, batch_idx):
        self.measures[1].update(self(batch[0]), batch[1])
        self.log_dict(self.measures[1])

    def on_validation_epoch_end(self):
        self.log("val/last", self.measures[1]["acc"].compute())


def test_metrics_and_logs(quiet, tmp_path):
    made = runs(Measured, quiet, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    plain, one, local = (Path(t.logger.log_dir, "metrics.csv").read_text() for t, _ in made)
    assert plain == one
    assert made[0][0].progress_bar_metrics.keys() == made[2][0].progress_bar_metrics.keys()
    heads = [[n for n in t.split("\n")[0].split(",") if "local/" not in n] for t in (plain, local)]
    assert heads[0] == heads[1]
    values, module = made[2][0].callback_metrics, made[2][1].eval()
    assert values["train/acc_epoch"] == values["local/03/accuracy_epoch"]
    assert values["val/acc"] == values["val/last"] == (module(X).argmax(1) == Y).float().mean()


@pytest.mark.parametrize("members", [{
    "on_save_checkpoint": lambda self, c: c.update(
        mine=sorted(c["state_dict"]), bias=c["state_dict"].pop("network.fc.bias")),
    "on_load_checkpoint": note(lambda self, c: (*c["mine"], *sorted(c["state_dict"]))),
}, {
    "state_dict": lambda self, *args, **kwargs: {
        n: t for n, t in Mine.state_dict(self, *args, **kwargs).items() if "stem" not in n},
}])  # fmt: skip
def test_own_checkpoints(members, quiet, tmp_path):
    files, kind = [], mine(**members, strict_loading=False)
    for trainer, module in runs(kind, quiet):
        trainer.save_checkpoint(tmp_path / "file")
        files.append([*torch.load(tmp_path / "file")["state_dict"]])
        fit(trainer.lightning_module, quiet, epochs=3, checkpoint=tmp_path / "file")
        files.append(module.seen)
    assert files[:2] == files[2:4] == files[4:]


def test_optimizers_and_schedulers_are_lists_with_local_modules(quiet):
    """They can't be one; with one module they are, as in the plain run."""
    for way, many in ((partial(LocalLearner, method="EndToEnd"), False), (greedy, True)):
        module = mine()()
        fit(way(module), quiet, epochs=1)
        for found in (module.optimizers(), module.lr_schedulers()):
            assert (isinstance(found, list) and len(found) == 4) == many


def test_a_narrow_backbones_heads_are_as_wide_as_the_classifier(quiet):
    learner = greedy(beside(3), network="backbone")
    fit(learner, quiet, epochs=1)
    assert learner.local_modules[0].head[-1].out_features == CLASSES
