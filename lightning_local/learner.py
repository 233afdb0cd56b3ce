"""LocalLearner: the LightningModule that wraps the user's and trains it by local learning.

Here: arguments, hooks, what the Trainer asks for. The training loop itself is in `loop.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_local import arguments, build, hooks, optim, state
from lightning_local.balancing import split_points
from lightning_local.callbacks import callbacks_of, wants_heads, with_ours
from lightning_local.examples import answer_for_itself, batch_size, example_inputs, let_go
from lightning_local.guarding import guard_loading, unguard_loading
from lightning_local.head_accuracy import AfterHeads, HeadAccuracy
from lightning_local.hooks import call_hook
from lightning_local.links import InProcessLinks
from lightning_local.local_module import LocalModule
from lightning_local.loop import TrainingLoop
from lightning_local.methods import LocalMethod
from lightning_local.partition import Partition, check_names
from lightning_local.publisher import share_metrics
from lightning_local.randomness import Streams
from lightning_local.wrapper import Wrapper
from lightning_local.wrapping import Unpack, default_unpack, find_network

__all__ = ["LocalLearner"]


class LocalLearner(Wrapper):
    """Trains an existing LightningModule by local learning.

    Args:
        module: The user's module, with automatic optimization; its `training_step`, metrics,
            logging, evaluation steps and `configure_optimizers` are used as they are.
        method: A method, or the name of a preset in `methods.METHODS`.
        partition: `"units"` (one local module per unit), a number of local modules, a list of
            split points, or a `Partition`.
        network: Attribute of the module that is cut; default its only child with parameters, or
            `"."`, the module's own forward, when it defines layers directly.
        criterion: Loss of the heads, `(output, target) -> scalar`; default cross entropy. The last
            local module's loss is what the user's `training_step` returns.
        unpack: Function from a batch to `(input, target)`; default takes pairs and usual dicts.
        out_features: Number of outputs of the heads; default the network's.
        optimizer: Function from parameters to an optimizer, called per local module; default the
            user's own optimizer, cloned per local module with groups and schedulers.
        lr_scheduler: Function from an optimizer to a scheduler (per epoch); needs `optimizer`.
        recompute: Activations that are computed once more in the backward instead of being kept,
            without any change of results: `"none"`; `"blocks"`, by each unit; `"body"`, by each
            local module's whole body, behind its head's backward; a list of the local modules that
            recompute their bodies, or a dict such as `{0: "blocks", 3: "body"}`.
        compile: Compile each body and head with `torch.compile`, or one of its modes, such as
            `"reduce-overhead"`, which captures CUDA graphs; a method that differentiates local
            modules twice (SGR) leaves those eager, and says so.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or the module can't be wrapped.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import DemoModel
        >>> from lightning_local import methods
        >>> learner = LocalLearner(DemoModel(), method=methods.EndToEnd())
        >>> learner.num_modules
        1
    """

    def __init__(
        self,
        module: pl.LightningModule,
        method: LocalMethod | str = "AugLocal",
        partition: Partition | int | list[str] | list[int] | str = "units",
        *,
        network: str | None = None,
        criterion: nn.Module | Callable[[Any, Any], Any] | None = None,
        unpack: Callable[[Any], tuple[Any, Any]] | None = None,
        out_features: int | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        recompute: str | list[int] | dict[int, str] = "none",
        compile: bool | str = False,
    ) -> None:
        hooks.check_module(module)
        super().__init__(module)
        self.method, self.partition = arguments.method_and_partition(method, partition)
        arguments.check_options(out_features, criterion, unpack, optimizer, lr_scheduler)
        self.recompute = arguments.check_recompute(recompute)
        self.automatic_optimization = False
        end_to_end = arguments.ends_to_end(self.partition)
        self.whole = end_to_end and self.recompute == "none"  # nothing is to be cut
        self._network_given = "." if self.whole and network is None and not compile else network
        try:
            self._find_network()
        except ValueError:
            # What these hooks make is there at setup, where it is looked for again.
            if not any(is_overridden(hook, module) for hook in ("configure_model", "setup")):
                raise
        # In a tuple, so that it is no submodule: each local module has a copy of its own.
        self._criterion = (criterion or nn.CrossEntropyLoss(),)
        self.default_criterion = criterion is None
        self.unpack = Unpack(unpack) if unpack is not None else default_unpack
        self.out_features = out_features
        self.optimizer_callable = optimizer
        self.lr_scheduler_callable = lr_scheduler
        self.compiles = arguments.check_compile(compile)
        self.local_modules = nn.ModuleList()
        self.split_points: tuple[str, ...] = ()
        self.cutting: Any = None
        self._built: dict[str, Any] = {}
        self.streams = Streams(0, 1)
        self.batches = 0
        self.planned_batch_size: int | None = None
        self.num_modules = 1 if end_to_end else 0  # 0 until the network is cut
        self.loop: TrainingLoop | None = None
        self.head_accuracy: HeadAccuracy | None = None
        self.configs: list[LRSchedulerConfig] = []
        self.resumed = state.Resumed()
        self._given_optimizer: Callable[[], Any] | None = None
        hooks.forward_hooks(self, module)
        for name in ("validation_step", "test_step"):
            if is_overridden(name, module):
                setattr(self, name, AfterHeads(self, name))

    def _find_network(self) -> None:
        """Checks the arguments that name parts of the user's module, once these are there."""
        name = find_network(self.module, self._network_given, traced=not self.whole)
        if not arguments.ends_to_end(self.partition):
            network = self.module if name == "." else self.module.get_submodule(name)
            check_names(network, self.partition, name)
        self.network_name = name

    def __getstate__(self) -> dict[str, Any]:
        """A copy is no part of the run that goes on."""
        run: dict[str, Any] = {"loop": None, "head_accuracy": None, "configs": []}
        return {**super().__getstate__(), **run, "links": InProcessLinks()}

    def configure_callbacks(self) -> Any:
        """The user's callbacks and ours."""
        # A LightningCLI with --optimizer puts its own method on the instance; it is the recipe.
        self._given_optimizer = self.__dict__.pop("configure_optimizers", self._given_optimizer)
        arguments.check_optimizer(self._given_optimizer, self.optimizer_callable)
        added = with_ours(callbacks_of(self.trainer), call_hook(self.module, "configure_callbacks"))
        hooks.check_callbacks([*callbacks_of(self.trainer), *added])
        # Until `setup`: the Trainer's check, which runs in between, refuses its flags for clipping
        # and accumulation with manual optimization, and the loop carries them out.
        self.automatic_optimization = True
        return added

    def release(self) -> None:
        """Takes everything the run hung on the Trainer off again, and drops what a step held."""
        unguard_loading(self.trainer.strategy)
        let_go(self.trainer)
        answer_for_itself(self)
        self.automatic_optimization = False
        self.head_accuracy = None
        if self.loop is not None:
            self.loop.close()

    def setup(self, stage: str) -> None:
        """Cuts the network and makes the heads, before weights and optimizers are restored."""
        self.automatic_optimization = False
        self.resumed = state.Resumed()
        if not hooks.check_trainer(self.trainer) and self.links.of_strategy:
            self.links = InProcessLinks()
        guard_loading(self.trainer.strategy)
        call_hook(self.module, "setup", stage)
        if not is_overridden("configure_model", self.module):
            self._build(stage)

    def configure_model(self) -> None:
        """The user's `configure_model`, then what `setup` does otherwise.

        Lightning's weight averaging calls it early, and copies what is there then: heads too.
        """
        call_hook(self.module, "configure_model")
        with torch.device("cpu"):
            self._build(str(self.trainer.state.fn.value if self.trainer.state.fn else "fit"))

    def teardown(self, stage: str) -> None:
        """Leaves the user's module as it was, but trained."""
        call_hook(self.module, "teardown", stage)
        self.release()

    def _build(self, stage: str) -> None:
        if not self.network_name:
            self._find_network()
        wanted = stage == "fit" or wants_heads(callbacks_of(self.trainer), stage)
        wanted |= not (self.links.first and self.links.last)
        if self.cutting is not None:
            build.check_same(self, self._built)
        elif wanted and not self.whole:
            self.build(*self.examples())

    def examples(self) -> Any:
        """Inputs of the network, found where the data are read."""
        if self.partition.balance != "units":
            self.planned_batch_size = self.links.from_first(lambda: batch_size(self))
        return self.links.from_first(lambda: example_inputs(self))

    def build(self, *inputs: Any, partition: Partition | None = None) -> None:
        """Cuts the network and makes the heads; the Trainer does it by itself.

        Args:
            inputs: An input of the network, of any batch size.
            partition: Where to cut; default as the learner was asked to.

        Raises:
            ValueError: The network can't be cut as asked.
        """
        seed = self.links.from_first(torch.initial_seed)
        builder = build.builder_of(self, inputs, partition or self.partition, seed)
        points = split_points(self, builder)
        if builder.request.balance != "units":
            # What is measured may differ by a byte from process to process.
            points = self.links.from_first(lambda: points)
        self.cutting, modules = builder.make(points, self.recompute)
        self.local_modules = nn.ModuleList(modules)
        self.split_points = self.cutting.split_points
        self.num_modules = len(modules)
        self._built = build.form_of(self)
        # Replicas see other data, and draw other numbers.
        self.streams = Streams(seed + self.links.replica, self.num_modules)

    def configure_optimizers(self) -> Any:
        """One optimizer per local module, with schedulers."""
        recipes = optim.recipes(
            self._given_optimizer or self.module.configure_optimizers,
            self.optimizer_callable,
            self.lr_scheduler_callable,
            *self.parameters_per_module(),
            shared=[self.trainer, self, *self.modules()],
        )
        self.configs = [config for _, configs in recipes for config in configs]
        return [optimizer for optimizer, _ in recipes], optim.for_lightning(recipes)

    def parameters_per_module(self) -> tuple[list[list[nn.Parameter]], list[list[nn.Parameter]]]:
        """For each local module its parameters of the user's module, and those of its head."""
        return build.parameters_per_module(self.module, self.modules_in_order())

    def modules_in_order(self) -> list[LocalModule]:
        """The K local modules; empty for a learner that trains end to end."""
        return [module for module in self.local_modules if isinstance(module, LocalModule)]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The user's hook, then clipping: here gradients are unscaled."""
        call_hook(self.module, "on_before_optimizer_step", optimizer)
        if self.trainer.gradient_clip_val or is_overridden("clip_gradients", self.module):
            self.module.clip_gradients(
                optimizer,
                gradient_clip_val=self.trainer.gradient_clip_val,
                gradient_clip_algorithm=self.trainer.gradient_clip_algorithm,
            )

    def on_train_start(self) -> None:
        """Starts the loop of this fit."""
        self.loop = TrainingLoop(self)
        self.loop.resume(self.resumed)
        self.resumed = state.Resumed()
        call_hook(self.module, "on_train_start")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One batch through all local modules; returns what the user's step returned."""
        assert self.loop is not None
        return self.loop.run(batch, batch_idx)

    def on_train_epoch_start(self) -> None:
        """What a resumed run has to make up for, then the user's hook."""
        assert self.loop is not None
        self.loop.start_epoch()
        call_hook(self.module, "on_train_epoch_start")

    def on_train_epoch_end(self) -> None:
        """The user's hook, where the steps ran, then the epoch's local metrics are logged."""
        if self.links.last:
            call_hook(self.module, "on_train_epoch_end")
        assert self.loop is not None
        self.loop.log_epoch()
        if not self.links.alone:
            share_metrics(self.trainer, self.links)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes the user's checkpoint with one entry of ours, after a look for NaN losses."""
        if self.loop is not None and self.trainer.state.status != "interrupted":
            self.loop.check_losses()
        if state.save(self, checkpoint):
            call_hook(self.module, "on_save_checkpoint", checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts back what was moved, before weights are loaded."""
        call_hook(self.module, "on_load_checkpoint", checkpoint)
        state.load(self, checkpoint)
