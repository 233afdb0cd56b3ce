"""Several stages are one process bit for bit: weights, optimizers, metrics and random states."""

from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from fleet import QUIET, differences, single, together, trainer
from lightning.pytorch.utilities import CombinedLoader
from simple import CLASSES, METHODS, Lit, data
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_local import LocalLearner, couplings, heads, methods


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def fit(make, method="Greedy", module=Lit, train=None, val=None, learner=None, **options):
    L.seed_everything(3, verbose=False, workers=True)
    method = METHODS[method]() if isinstance(method, str) else method()
    learner = LocalLearner(module(), method, **(learner or {}))
    L.seed_everything(4, verbose=False, workers=True)
    trainer = make(**{"max_epochs": 2, "log_every_n_steps": 2, **options})
    trainer.fit(learner, train() if train else data(), val() if val else data(shuffle=False))
    return trainer


# Networks.


class Classifier(nn.Module):
    """A stem, blocks and a linear layer."""

    def __init__(self, make_block, blocks=3, width=6):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(make_block(width) for _ in range(blocks))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class InPlace(nn.Module):
    """Begins with an operation that overwrites what it is given."""

    def __init__(self, width):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.bn(self.conv(self.relu(x)))


class InPlaceFirst(Classifier):
    """Overwrites even the batch."""

    def forward(self, x):
        return super().forward(x.mul_(0.5))


class ChannelsLast(Classifier):
    def forward(self, x):
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x, mask):
        return functional.relu(self.bn(self.conv(x))) * mask


class Masked(Classifier):
    """A mask of the input, and one of a hidden state without gradient, go along to every block."""

    def forward(self, x):
        mask = x > 0
        x = self.stem(x)
        gate = (x.detach() > 0.5).any(1, keepdim=True)
        for block in self.blocks:
            x = block(x, mask | gate if x.shape[2:] == mask.shape[2:] else mask)
        return self.fc(x.mean((2, 3)))


class Counting(InPlace):
    """A block with a state beside its tensors."""

    def __init__(self, width):
        super().__init__(width)
        self.count = 0

    def forward(self, x):
        if self.training:
            self.count += 1
        return super().forward(x)

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def network(make):
    return lambda: Lit(make())


# Modules.


class Named(Lit):
    """Dicts with names and weights of the samples."""

    def loss(self, batch):
        assert all(name.startswith("sample") for name in batch["names"])
        losses = functional.cross_entropy(self(batch["x"]), batch["y"], reduction="none")
        return (losses * batch["weight"]).mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss, on_epoch=True, batch_size=len(batch["y"]))
        return {"loss": loss, "names": batch["names"]}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), batch_size=len(batch["y"]))


class Names(Dataset):
    def __init__(self):
        self.tensors = data().dataset.tensors

    def __len__(self):
        return 40

    def __getitem__(self, i):
        x, y = self.tensors[0][i], self.tensors[1][i]
        # Long ones, so that a header does not fit into the first part of a message.
        return {"x": x, "y": y, "names": f"sample {i} " * 200, "weight": torch.tensor(i / 40)}


def named(shuffle=True):
    return DataLoader(Names(), 16, shuffle=shuffle)


class Endless(Lit):
    """Does not know how many batches there are."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Stream(IterableDataset):
    """Batches without a length; each draws from the process's generators."""

    def __init__(self, batches, noise=0.1):
        self.batches = batches
        self.noise = noise

    def __iter__(self):
        x, y = data().dataset.tensors
        for i in range(self.batches):
            rows = slice(16 * i, 16 * (i + 1))
            noise = torch.randn(x[rows].shape) + float(np.random.rand())
            yield x[rows] + self.noise * noise, y[rows]


def stream(batches=3, **options):
    return DataLoader(Stream(batches, **options), batch_size=None)


class SeveralVal(Lit):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log(f"val/loss{dataloader_idx}", functional.cross_entropy(self(x), y))


def several_val():
    return [data(shuffle=False), stream(2, noise=0), data(shuffle=False, n=10, size=4)]


class Joined(Lit):
    """Batches of two loaders, joined."""

    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 6, 6)

    def training_step(self, batch, batch_idx):
        x, y = join(batch)
        loss = functional.cross_entropy(self(x), y)
        self.log("train/loss", loss, on_epoch=True, batch_size=len(y))
        return loss


class JoinedEndless(Joined, Endless):
    pass


def join(batch):
    return tuple(torch.cat([batch["a"][i], batch["b"][i]]) for i in range(2))


def combined():
    return CombinedLoader({"a": data(n=40, size=8), "b": data(n=10, size=4)}, "max_size_cycle")


def two_streams():
    return CombinedLoader({"a": stream(3), "b": stream(2)}, "min_size")


class Augmented(Lit):
    """Augments where the data are read."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        if self.trainer.training:
            x = x + 0.1 * torch.randn_like(x)
            self.seen.append(float(x.sum()))
        return x, y


class Noise(Dataset):
    """Draws in the workers."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        x = torch.randn(1, 6, 6) + float(np.random.rand())
        return x, i % CLASSES


def in_workers():
    # A process of the fleet would start a server of its own for them.
    return DataLoader(Noise(), 8, num_workers=1, shuffle=True, multiprocessing_context="fork")


PRESETS = {name: partial(fit, method=name) for name in METHODS if name != "EndToEnd"}

SEVERAL_UNITS = {
    "augmented-link": partial(
        fit, method=lambda: methods.AugLocal(depth=1, coupling=couplings.BackwardLink())
    ),
    "sgr-every-2": partial(fit, method=lambda: methods.SGR(every=2, warmup=3)),
    "in-place": partial(fit, module=network(partial(Classifier, InPlace)), method="BackLink"),
    "in-place-first": partial(fit, module=network(partial(InPlaceFirst, InPlace)), method="SGR"),
    "channels-last": partial(fit, module=network(partial(ChannelsLast, InPlace))),
    "mask": partial(fit, module=network(partial(Masked, Gate)), method="BackLink"),
    "extra-state": partial(fit, module=network(partial(Classifier, Counting))),
    "in-flight-1": partial(fit, strategy={"in_flight": 1}, method="BackLink"),
    "in-flight-3": partial(fit, strategy={"in_flight": 3}, method="SGR"),
    "two-modules": partial(fit, learner={"partition": 2}),
    "own-optimizer": partial(
        fit,
        learner={
            "optimizer": partial(torch.optim.Adam, lr=0.01),
            "lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1),
        },
    ),
    "accumulate": partial(fit, accumulate_grad_batches=2, method="BackLink"),
    "accumulate-clip": partial(
        fit, accumulate_grad_batches=2, gradient_clip_val=0.05, method="SGR"
    ),
    "clip-value": partial(fit, gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "bf16": partial(fit, precision="bf16-mixed", method="SGR"),
    "limit": partial(fit, limit_train_batches=2, limit_val_batches=1),
}
DATA = {
    "dicts": partial(fit, module=Named, train=named, val=partial(named, False), method="InfoPro"),
    "stream": partial(fit, module=Endless, train=stream, val=partial(stream, 2)),
    "stream-limit": partial(fit, module=Endless, train=stream, limit_train_batches=2),
    "several-val": partial(fit, module=SeveralVal, val=several_val),
    "combined": partial(fit, module=Joined, train=combined, learner={"unpack": join}),
    "two-streams": partial(fit, module=JoinedEndless, train=two_streams, learner={"unpack": join}),
    "one-batch": partial(fit, train=partial(data, n=10), method="BackLink"),
    "augmented": partial(fit, module=Augmented),
    "workers": partial(fit, train=in_workers),
}


# Replicas.


class Still(nn.Module):
    """Without dropout and running statistics."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return functional.relu(x + self.conv(x))


def share():
    """Of each batch of 16 this process's share."""
    inside = torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), 2) if inside else (0, 1)
    tensors = data(n=32).dataset.tensors
    return DataLoader(TensorDataset(*(t[rank::size] for t in tensors)), 16 // size)


class Synced(Lit):
    """Logs means over the replicas."""

    def log(self, *args, **options):
        super().log(*args, **{"sync_dist": True, **options})


def synced(make):
    return lambda: Synced(make())


REPLICAS = {
    name: partial(fit, method=name, module=Synced) for name in ("Greedy", "BackLink", "SGR")
}
STILL = {
    f"still {name}": partial(
        fit,
        method=method,
        module=synced(partial(Classifier, Still)),
        train=share,
        use_distributed_sampler=False,
    )
    for name, method in {
        "Greedy": methods.Greedy,
        "BackLink": lambda: methods.BackLink(head=heads.Linear()),
    }.items()
}
CASES = PRESETS | SEVERAL_UNITS | DATA | REPLICAS | STILL


def outcome(name, make, folder):
    """All that a run leaves; the file on the rank that writes it."""
    path = folder / "a.ckpt"
    run = CASES[name](lambda **options: make(callbacks=[Save(path)], **options))
    left = {
        "network": run.lightning_module.module.state_dict(),
        "metrics": dict(run.callback_metrics),
        "step": run.global_step,
    }
    if run.is_global_zero:
        left["file"] = torch.load(path, weights_only=True)
    return left


def in_fleet(rank, size, names, folder, options):
    found = {}
    for name in names:
        inside = folder / f"{name}{size}"
        inside.mkdir(exist_ok=True)
        found[name] = outcome(name, partial(trainer, rank, size, QUIET, **options), inside)
    return found


def check(names, size, folder, **options):
    several = together(size, in_fleet, size, names, folder, options)
    wrong = []
    for name in names:
        one = outcome(name, single, folder)
        for rank, found in enumerate(several):
            got = found[name]
            wanted = {key: one[key] for key in got}
            wrong += [f"{name}, rank {rank}: {text}" for text in differences(wanted, got)]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("size", [2, 3])
def test_every_method_equals_one_process(size, tmp_path):
    check(list(PRESETS), size, tmp_path)


def test_networks_and_options_equal_one_process(tmp_path):
    check(list(SEVERAL_UNITS), 2, tmp_path)


def test_data_of_all_kinds_equal_one_process(tmp_path):
    check([name for name in DATA if name != "two-streams"], 2, tmp_path)


def test_batches_pass_a_stage_in_the_middle(tmp_path):
    check(["dicts", "stream"], 3, tmp_path)


def test_two_streams_equal_one_process(tmp_path):
    """Both iterators are made before the first batch of either; making one draws a number."""
    check(["two-streams"], 2, tmp_path)


def test_a_placement_of_ones_own_equals_one_process(tmp_path):
    names = ["Greedy", "BackLink"]
    check(names, 2, tmp_path, strategy={"placement": [0, 1, 1, 1]})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One stage in two replicas."""
    folder = tmp_path_factory.mktemp("pair")
    options = {"data_parallel": 2, "num_stages": 1}
    return together(2, in_fleet, 2, [*REPLICAS, *STILL], folder, options)


def test_stages_in_replicas_equal_one_stage_in_replicas(pair, tmp_path):
    options = {"data_parallel": 2, "num_stages": 2}
    four = together(4, in_fleet, 4, list(REPLICAS), tmp_path, options)
    wrong = []
    for rank, found in enumerate(four):
        for name in REPLICAS:
            wanted = {key: pair[rank % 2][name][key] for key in found[name]}
            wrong += [f"{name}, rank {rank}: {t}" for t in differences(wanted, found[name])]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("name", STILL)
def test_replicas_equal_one_process_on_the_joined_batch(name, pair, tmp_path):
    """To 1e-6: a mean of two means."""
    one = outcome(name, single, tmp_path)
    for found in pair:
        assert found[name]["step"] == one["step"] == 4
        for key, tensor in one["network"].items():
            got = found[name]["network"][key]
            torch.testing.assert_close(got, tensor, rtol=1e-6, atol=1e-6, msg=key)
