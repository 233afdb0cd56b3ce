"""`lightning-local plan`: what a configuration would need, and where to cut its network."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_local.cli import LocalCLI
from lightning_local.examples import samples_of
from lightning_local.learner import LocalLearner
from lightning_local.planner import plan_partition

__all__ = ["run_plan"]

_OURS = ("memory", "stages", "batch_size", "reserve", "measure")


class _PlanCLI(LocalCLI):
    """Reads the configuration of a fit, but makes neither Trainer, callbacks nor loggers."""

    def __init__(self, args: list[str]) -> None:
        # Without data there may be an example, or the shape of one.
        super().__init__(
            args=args,
            run=False,
            save_config_callback=None,
            datamodule_class=None,
            subclass_mode_data=True,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The plan's own options; those of `fit` may stand in the file and are not used."""
        options: list[tuple[str, Any, Any, str]] = [
            ("memory", str | float | None, None, "bytes to stay below, such as 8GiB"),
            ("stages", int | None, None, "number of devices to spread local modules over"),
            ("batch_size", int | None, None, "default the datamodule's"),
            ("reserve", float, 0.1, "share of the memory left for what is not predicted"),
            ("measure", str | None, None, "device on which units are timed, such as cuda"),
            ("input_shape", list[int] | None, None, "of a sample, for a network of one image"),
            ("picture", str | None, None, "file for the picture, such as plan.png"),
        ]
        for name, kind, default, text in options:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        known = ("self", "model", "train_dataloaders", "val_dataloaders", "datamodule")
        for name in inspect.signature(pl.Trainer.fit).parameters:
            if name not in known:
                parser.add_argument(f"--{name}", type=Any, default=None, help="not used")

    def before_instantiate_classes(self) -> None:
        """Keeps what a step depends on, and nothing that needs the run's devices."""
        trainer = self.config.trainer
        self.flags: dict[str, Any] = {
            "precision": trainer.precision or "32-true",
            "accumulate_grad_batches": trainer.accumulate_grad_batches or 1,
        }
        for name in ("callbacks", "logger", "strategy", "plugins", "profiler"):
            trainer[name] = None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None is needed."""
        return None


def run_plan(args: list[str]) -> int:
    """Plans and prints.

    Args:
        args: The command line behind `plan`.

    Returns:
        The exit status: 1 if nothing fits the budget, 2 for a mistake.
    """
    with _no_other_arguments():
        cli = _PlanCLI(args)
    learner, data, config = cli.model, cli.datamodule, cli.config
    if not isinstance(learner, LocalLearner):
        return _failed(
            f"the model is a {type(learner).__name__}: plan needs a lightning_local.LocalLearner "
            "around it, with the method to plan for."
        )
    size = config.batch_size if config.batch_size is not None else _batch_size(data)
    batch = None
    if config.input_shape is not None:
        learner.module.example_input_array = torch.rand(2, *config.input_shape)
    elif learner.module.example_input_array is None:
        if data is None:
            return _failed(
                "the form of the network's input is not known: pass --input_shape, set "
                "example_input_array in the wrapped module, or configure a datamodule."
            )
        try:
            batch, found = _looked_at(data, learner)
        except Exception as error:
            return _failed(
                f"the data can't be looked at without a Trainer ({type(error).__name__}: {error}): "
                "pass --input_shape, or set example_input_array in the wrapped module."
            )
        size = found if size is None else size
    options: dict[str, Any] = {name: config[name] for name in _OURS if name != "batch_size"}
    try:
        plan = plan_partition(learner, batch, batch_size=size, **options, **cli.flags)
    except (TypeError, ValueError) as error:
        return _failed(str(error))
    print(plan)
    if config.picture is not None:
        print(f"Picture: {plan.save_picture(config.picture)}")
    return 0 if plan.choice.fits else 1


def _looked_at(data: Any, learner: LocalLearner) -> tuple[Any, int | None]:
    """A batch of two samples as a training step would get it, and the loader's batch size."""
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if isinstance(loader, (dict, list, tuple)):
        raise ValueError("there are several training dataloaders")
    batch, size = samples_of(loader)
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        owner = data if is_overridden(hook, data) else learner.module
        batch = getattr(owner, hook)(batch, 0)
    return batch, size


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


@contextmanager
def _no_other_arguments() -> Iterator[None]:
    """Lightning warns of arguments that are given twice, and these are the program's own."""
    before = sys.argv
    sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before


def _batch_size(data: Any) -> int | None:
    """What a datamodule usually calls it."""
    found = getattr(data, "batch_size", None)
    if found is None and data is not None:
        found = data.hparams.get("batch_size")
    return found if isinstance(found, int) else None
