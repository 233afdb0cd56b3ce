"""What the processes run: fits with Lightning, and pipelines that backpropagate end to end."""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.parallel.fleet import device_of
from benchmarks.parallel.recording import Clock, Recorder, Times, as_stages
from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, LocalParallelStrategy, methods

METHODS = {
    "Greedy": methods.Greedy,
    "AugLocal, d=2": lambda: methods.AugLocal(depth=2),
    "SGR": methods.SGR,
    "BackLink": methods.BackLink,
}
SCHEDULES = {"GPipe": pipelining.ScheduleGPipe, "1F1B": pipelining.Schedule1F1B}


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: Of the method, or of the schedule of an exact pipeline; "end to end" otherwise.
        processes: How many.
        threads: Of each.
        replicas: Data-parallel ones.
        split: Name of the split.
        sizes: Local modules, or units, of each stage; empty for one stage.
        micro: Micro-batches of a pipeline.
    """

    name: str
    processes: int = 1
    threads: int = 1
    replicas: int = 1
    split: str = ""
    sizes: tuple[int, ...] = ()
    micro: int = 0


class Batches(Dataset[Any]):
    """The same few random batches again and again, so that reading them takes no time.

    Args:
        count: How many.
        size: Images in each.
    """

    def __init__(self, count: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.count = count
        self._made = [
            (
                torch.randn(size, 3, 32, 32, generator=generator),
                torch.randint(10, (size,), generator=generator),
            )
            for _ in range(4)
        ]

    def __len__(self) -> int:
        """Number of batches."""
        return self.count

    def __getitem__(self, index: int) -> Any:
        """A batch."""
        return self._made[index % 4]


def _strategy(case: Case, options: argparse.Namespace) -> Any:
    if case.processes == 1:
        return "auto"
    environment = TorchElasticEnvironment()
    if case.name not in METHODS:
        return DDPStrategy(cluster_environment=environment, process_group_backend=options.backend)
    stages = as_stages(case.sizes)
    return LocalParallelStrategy(
        num_stages=len(stages) or 1,
        data_parallel=case.replicas,
        placement=[s for s, owned in enumerate(stages) for _ in owned] or None,
        cluster_environment=environment,
        process_group_backend=options.backend,
    )


def fit(rank: int, size: int, options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Trains with Lightning; returns what was recorded."""
    recorder = Recorder()
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(case.threads)
    model: Any = LitClassifier(CifarResNet(options.depth))
    if case.name in METHODS:
        model = LocalLearner(model, METHODS[case.name]())
    count = options.warm_up + options.batches + options.cool_down
    data = Batches(count * case.replicas, options.batch // case.replicas)
    trainer = L.Trainer(
        accelerator=options.accelerator, devices=case.processes, max_epochs=1,
        strategy=_strategy(case, options), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[recorder],
        limit_val_batches=0,
    )  # fmt: skip
    try:
        trainer.fit(model, DataLoader(data, batch_size=None))
    finally:
        torch.set_num_threads(1)
    return recorder.result(options)


def units_of(network: CifarResNet) -> list[nn.Module]:
    """The same network as a list, cut where `LocalLearner` cuts it."""
    stem = nn.Sequential(network.conv1, network.bn1, network.relu)
    blocks = [*network.layer1, *network.layer2, *network.layer3]
    end = nn.Sequential(blocks.pop(), network.avgpool, nn.Flatten(), network.fc)
    return [stem, *blocks, end]


def time_units(rank: int, size: int, options: argparse.Namespace) -> dict[int, Times]:
    """Seconds of each unit's forward and backward, to find a balanced split for pipelines."""
    device = device_of(rank, options)
    units = [unit.to(device) for unit in units_of(CifarResNet(options.depth))]
    clock = Clock(device)
    images = torch.randn(options.batch, 3, 32, 32, device=device)
    rows = []
    for _ in range(2 + options.batches):
        x, moments = images, [clock.now()]
        for k, unit in enumerate(units):
            x = unit(x.detach().requires_grad_(k > 0))
            x.backward(torch.ones_like(x))
            moments.append(clock.now())
        ends = [clock.seconds(moment) for moment in moments]
        rows.append([b - a for a, b in itertools.pairwise(ends)])
    means = [statistics.fmean(column) for column in zip(*rows[2:], strict=True)]
    return {k: Times(0.0, 0.0, mean, 0.0) for k, mean in enumerate(means)}


def pipeline(rank: int, size: int, options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Backpropagates end to end in a pipeline of torch.distributed, outside of Lightning."""
    torch.manual_seed(0)
    device = device_of(rank, options)
    units = units_of(CifarResNet(options.depth))
    network = nn.Sequential(*(units[k] for k in as_stages(case.sizes)[rank])).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    stage = pipelining.PipelineStage(network, rank, size, device)
    schedule = SCHEDULES[case.name](stage, case.micro, loss_fn=functional.cross_entropy)
    recorder = Recorder(device)
    recorder.wrap(stage, "forward_one_chunk", "forward", lambda chunk, *args: chunk)
    recorder.wrap(stage, "backward_one_chunk", "backward", lambda chunk, *args: chunk)
    recorder.wrap(optimizer, "step", "step")
    waits: Any = schedules
    original = waits._wait_batch_p2p
    recorder.wrap(waits, "_wait_batch_p2p", "await")
    data = Batches(options.warm_up + options.batches, options.batch)
    try:
        for images, labels in (data[t] for t in range(len(data))):
            given = (images.to(device),) if rank == 0 else ()
            target = {"target": labels.to(device), "losses": []} if rank == size - 1 else {}
            schedule.step(*given, **target, return_outputs=False)
            optimizer.step()
            optimizer.zero_grad()
            recorder.ends.append(recorder.clock.now())
    finally:
        waits._wait_batch_p2p = original
    return recorder.result(options)
