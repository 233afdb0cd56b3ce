"""LocalParallelStrategy: local modules on separate devices, updated in parallel.

Each process runs the learner's one loop over the local modules that live on it. Nothing in a batch
is common to all processes, so nobody waits but for the messages of the method.
"""

from __future__ import annotations

import signal
import sys
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import StrategyRegistry

from lightning_local import limits
from lightning_local.alarm import StageError
from lightning_local.distributed_links import DistributedLinks
from lightning_local.evaluation import evaluate
from lightning_local.feeding import feed
from lightning_local.gathering import GatheringStrategy
from lightning_local.holdings import Holdings
from lightning_local.in_step import InStep, where
from lightning_local.links import BrokenLinks, InProcessLinks
from lightning_local.placement import check_shared, stages_of
from lightning_local.processes import Processes
from lightning_local.ranges import count

if TYPE_CHECKING:
    pass

__all__ = ["LocalParallelStrategy"]


class LocalParallelStrategy(GatheringStrategy):
    """Places the local modules of a `LocalLearner` on separate devices, where they train at once.

    The result is bit for bit that of one process, for every method; replicas are averaged once per
    local module and step. Also `Trainer(strategy="local_parallel")`.

    Args:
        num_stages: How many blocks of neighbouring local modules there are, one process each;
            `"auto"`: as many as there are processes for.
        data_parallel: How many replicas each stage has, which see different data.
        placement: The stage of each local module, such as `[0, 0, 1]`; default contiguous blocks of
            equal cost, by FLOPs of a training step.
        in_flight: How many batches a stage may be ahead of the next one; 1 or more.
        send_input: Send the network's input to the last stage, too, for a step that reads it beside
            calling the network.
        process_group_backend: `"nccl"` or `"gloo"`; default by device. gloo moves CUDA tensors
            through the host's memory.
        timeout: How long a process waits for another one.
        accelerator: As Lightning's strategies take it.
        parallel_devices: As Lightning's strategies take it.
        cluster_environment: As Lightning's strategies take it.
        checkpoint_io: As Lightning's strategies take it.
        precision_plugin: As Lightning's strategies take it.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> LocalParallelStrategy(num_stages=4, data_parallel=2).distributed_sampler_kwargs
        {'num_replicas': 2, 'rank': 0}
    """

    serves_local_modules = True
    strategy_name = "local_parallel"

    def __init__(
        self,
        num_stages: int | Literal["auto"] = "auto",
        data_parallel: int = 1,
        placement: list[int] | None = None,
        in_flight: int = 2,
        send_input: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            num_stages,
            data_parallel,
            placement,
            timeout,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        name = type(self).__name__
        self._in_flight = count(name, "in_flight", in_flight, 1, "a number of batches")
        if not isinstance(send_input, bool):
            raise TypeError(f"{name}(send_input={send_input!r}): expected True or False.")
        if process_group_backend not in (None, "gloo", "nccl"):
            raise ValueError(
                f"{name}(process_group_backend={process_group_backend!r}): expected 'nccl' (CUDA "
                "devices), 'gloo' (also through the host's memory), or None for the device's own."
            )
        self._send_input = send_input
        self._backend = process_group_backend

    def setup_environment(self) -> None:
        """Connects the processes, and gives the learner its links."""
        learner = self._learner
        super().setup_environment()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        backend = self._backend or _get_default_process_group_backend_for_device(self.root_device)
        given: dict[str, Any] = {"timeout": self._timeout}
        if backend == "nccl":
            given["device_id"] = self.root_device
        _init_dist_connection(self.cluster_environment, backend, **given)
        if self._processes is None:
            self._processes = Processes(
                self._stages, self._data_parallel, self.root_device, backend, self._timeout
            )
        self._processes.open()
        self._links = DistributedLinks(self._processes, self._in_flight, self._send_input)
        learner.links = self._links
        learner._device_mesh = self._processes.mesh
        self._holdings = None
        self._in_step = InStep(self._links, self._processes)
        self._in_step.attach(learner.trainer)

    def setup(self, trainer: pl.Trainer) -> None:
        """Places the local modules."""
        assert self.accelerator is not None
        assert self.model is not None
        assert self._processes is not None
        assert self._links is not None
        self.accelerator.setup(trainer)
        learner, processes = self._learner, self._processes
        limits.check_run(learner, processes.num_stages)
        stages = stages_of(learner, self._placement, processes.num_stages)
        if processes.num_stages > 1:
            check_shared(learner, stages)
        owned = stages[processes.stage]
        self._links.place(stages)
        self._holdings = Holdings(learner, processes, stages, self._links.replicas)
        if self._layer_sync is not None and self._data_parallel > 1:
            # A function of torch's without types.
            convert: Any = torch.nn.SyncBatchNorm.convert_sync_batchnorm
            self.model = convert(self.model, processes.data_group)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self._holdings.make_replicas_alike()
        fitting = trainer.state.fn == "fit"
        if fitting:
            self.setup_optimizers(trainer)
            limits.check_schedulers(learner.configs, processes.num_stages)
            for k, optimizer in enumerate(self.optimizers):
                if k not in owned:  # its schedulers are stepped here, too; it steps elsewhere
                    optimizer._opt_called = True  # type: ignore[attr-defined]
        self.setup_precision_plugin()
        if fitting:
            for k in owned:
                _optimizer_to_device(self.optimizers[k], self.root_device)

    def model_to_device(self) -> None:
        """Moves this stage's part of the network."""
        assert self._holdings is not None
        self._holdings.to_device(self.root_device)

    def on_exception(self, exception: BaseException) -> None:
        """Tells the other processes, which would wait for this one."""
        processes = self._processes
        if processes is None and self._launcher is not None:
            self._launcher.kill(signal.SIGTERM)  # there is no other way to reach them yet
        if processes is None or processes.size == 1 or not self._is_broken():
            return
        where = processes.describe(processes.stage, processes.replica)
        if not isinstance(exception, StageError):
            text = "".join(traceback.format_exception(exception))
            processes.alarm.tell_failure(f"S{where[1:]} failed:\n\n{text}")
        note = f"This was {where}."
        if hasattr(exception, "add_note"):
            exception.add_note(note)
        else:
            print(note, file=sys.stderr, flush=True)

    def teardown(self) -> None:
        """Gives every process the trained network, and ends the connections."""
        learner: Any = self.lightning_module
        processes, links = self._processes, self._links
        whole = not self._is_broken()
        if whole and processes is not None and links is not None:
            if learner.trainer.state.fn == "fit" and self._holdings is not None:
                self.share_weights()
            processes.settle()
            processes.barrier()
            links.close()
            processes.close()
        if self._in_step is not None:
            self._in_step.detach(learner.trainer)
        if learner is not None:
            if self._holdings is not None:
                self._holdings.unguard()
            learner._device_mesh = None
            if not whole:
                learner.links = InProcessLinks() if processes is None else BrokenLinks()
        if self._layer_sync is not None and self._data_parallel > 1 and self.model is not None:
            self.model = self._layer_sync.revert(self.model)
        # Holdings and links stay, for a checkpoint that is saved after the fit.
        self._in_step = None
        super().teardown()

    # Batches.

    def process_dataloader(self, dataloader: object) -> object:
        """The first stage reads the data, the others wait for messages."""
        assert self._processes is not None
        return feed(dataloader, self._processes)

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """The batch, as it was read or as the stage before has sent it."""
        assert self._links is not None
        assert self._processes is not None
        self._links.where = where(self._learner.trainer)
        if self._links.first:
            batch = super().batch_to_device(batch, device, dataloader_idx)
            self._links.stop = self._processes.any_replica(self._processes.alarm.stop.is_set())
            if batch is None and self._learner.trainer.training:
                self._links.leave_out()  # Lightning passes over it
        else:
            batch = self._links.fetch()
        if self._links.stop:
            self._learner.trainer._signal_connector.received_sigterm = True
        return batch

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step on the last stage, with what the stages before have computed."""
        if self._one_stage:
            return super().validation_step(*args, **kwargs)
        with self.precision_plugin.val_step_context():
            return evaluate(self._learner, self._learner.module.validation_step, args)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step on the last stage, with what the stages before have computed."""
        if self._one_stage:
            return super().test_step(*args, **kwargs)
        with self.precision_plugin.test_step_context():
            return evaluate(self._learner, self._learner.module.test_step, args)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step on the last stage, with what the stages before have computed."""
        if self._one_stage:
            return super().predict_step(*args, **kwargs)
        with self.precision_plugin.predict_step_context():
            return evaluate(self._learner, self._learner.predict_step, args)

    @property
    def _one_stage(self) -> bool:
        return self._processes is None or self._processes.num_stages == 1

    def on_train_start(self) -> None:
        """From here on, weights of other stages are not current."""
        assert self._holdings is not None
        self._holdings.guard()

    def on_validation_start(self) -> None:
        """Replicas validate with the same running statistics."""
        assert self._holdings is not None
        self._holdings.guard()
        self._holdings.make_replicas_alike(buffers_alone=True)

    on_test_start = on_predict_start = on_validation_start

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers it under its name."""
        strategy_registry.register(
            cls.strategy_name,
            cls,
            description="Local modules on separate devices, updated in parallel",
            override=True,
        )


LocalParallelStrategy.register_strategies(StrategyRegistry)
