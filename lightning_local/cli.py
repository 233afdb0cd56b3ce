"""The command line: `lightning-local` and `python -m lightning_local`."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    _InstantiatorFn,
    _set_dict_nested,
)
from lightning.pytorch.core.mixins.hparams_mixin import (
    _given_hyperparameters,
    _given_hyperparameters_context,
)

from lightning_local.cli_errors import Parser, Refusal, kinds, options_of, place_of, raised_by
from lightning_local.learner import LocalLearner
from lightning_local.wrapper import of_the_module

__all__ = ["LocalCLI", "main"]


class LocalCLI(LightningCLI):
    """LightningCLI for learners and datamodules given by `class_path`.

    The module inside has its own hyper-parameters, as if it were the CLI's model; a checkpoint
    never changes what the configuration says is built. A value that a class of this package refuses
    is one short message; with `JSONARGPARSE_DEBUG=true` in the environment it has its traceback.

    Args:
        args: Model and datamodule class, as `LightningCLI` takes them.
        kwargs: Whatever else it takes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "model_class": pl.LightningModule,
            "datamodule_class": pl.LightningDataModule,
            "subclass_mode_model": not args and "model_class" not in kwargs,
            "subclass_mode_data": len(args) < 2 and "datamodule_class" not in kwargs,
            "save_config_kwargs": {"overwrite": True},
            "parser_class": Parser,
        }
        names = list(inspect.signature(LightningCLI.__init__).parameters)[1:]
        given = dict(zip(names, args, strict=False))
        super().__init__(**{**defaults, **given, **kwargs})

    @staticmethod
    @functools.cache  # jsonargparse makes a class of each function, one per name
    def wrap(module_class: type[pl.LightningModule]) -> Callable[..., LocalLearner]:
        """A model for a `LightningCLI` whose class is fixed: `LightningCLI(LocalCLI.wrap(Mine))`.

        Args:
            module_class: The user's class; its options stay where they were, and those of
                `LocalLearner` stand beside them, as `local_<name>` where both have one.

        Returns:
            A function that makes the learner, with the options of both as its signature.
        """
        inner, own = options_of(module_class), {}
        for name, parameter in options_of(LocalLearner).items():
            if name != "module":
                free = f"local_{name}" if name in inner else name
                own[free] = (name, parameter.replace(name=free))

        def make(**given: Any) -> LocalLearner:
            learner = {own[free][0]: given.pop(free) for free in list(given) if free in own}
            config = _given_hyperparameters.get()
            if config is None:
                return LocalLearner(module_class(**given), **learner)
            mine = {name: value for name, value in config.items() if name in inner}
            with _given_hyperparameters_context(mine, config["_instantiator"]):
                module = module_class(**given)
            token = _given_hyperparameters.set(None)
            try:
                return LocalLearner(module, **learner)
            finally:
                _given_hyperparameters.reset(token)

        every = [*inner.values(), *(parameter for _, parameter in own.values())]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in every]
        # Those without a default first, as Python wants it.
        parameters.sort(key=lambda p: p.default is not p.empty)
        made: Any = make
        made.__signature__ = inspect.Signature(parameters, return_annotation=LocalLearner)
        made.__annotations__ = {p.name: p.annotation for p in parameters}
        made.__annotations__["return"] = LocalLearner
        name = f"{module_class.__module__}.{module_class.__qualname__}"
        made.__name__ = made.__qualname__ = re.sub(r"\W", "_", name)
        made.__doc__ = module_class.__doc__
        return make

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """As Lightning's, with a word on what is no method of the Trainer."""
        parser = super().init_parser(**kwargs)
        parser.epilog = "lightning-local plan --help: predicts memory and recommends a partition."
        return parser

    def _add_instantiators(self) -> None:
        """As Lightning's, with the module inside a learner having its own hyper-parameters."""
        super()._add_instantiators()
        if self.subclass_mode_model:
            self.parser.add_instantiator(
                _ModuleInside(cli=self, key="model"), pl.LightningModule, subclasses=True
            )

    def _parse_ckpt_path(self) -> None:
        """Lightning would replace model and options by those the checkpoint was made with."""

    def instantiate_classes(self) -> None:
        """As Lightning's, but a constructor's error is not buried in all that jsonargparse tried.

        Ours about a value ends the program with a message; a user's comes with its own traceback.
        """
        self._failure: Exception | None = None
        for kind in kinds().values():
            self.parser.add_instantiator(self._make, kind, subclasses=True)
        try:
            super().instantiate_classes()
            return
        except Exception as error:
            cause = error
            while raised_by(cause) == "jsonargparse" and isinstance(cause.__cause__, Exception):
                cause = cause.__cause__
            if raised_by(cause) == "jsonargparse":
                cause = self._failure or error
            if cause is error and not isinstance(cause, Refusal):
                raise
        # Outside of the handler: Python would show what was tried as well.
        if isinstance(cause, Refusal):
            self.parser.error(str(cause), cause)
        raise cause

    def _make(self, class_type: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._noting(class_type, kwargs):
            return class_type(*args, **kwargs)

    @contextmanager
    def _noting(self, class_type: Any, given: Mapping[str, Any]) -> Iterator[None]:
        """Keeps what a constructor raises: of a union's errors, jsonargparse chains the first."""
        try:
            yield
        except Exception as error:
            self._failure = error
            owners = (class_type.__module__.partition(".")[0], raised_by(error))
            if {*owners} != {"lightning_local"} or not isinstance(error, (TypeError, ValueError)):
                raise
            config = self.config.get(str(self.config.get("subcommand")), self.config)
            place = place_of(config.as_dict(), class_type.__name__, given)
            self._failure = Refusal(f"{place} ({class_type.__name__}):\n  {error}".lstrip())
            raise self._failure from error


class _ModuleInside(_InstantiatorFn):
    cli: LocalCLI

    def __call__(
        self,
        class_type: Any,
        *args: Any,
        applied_instantiation_links: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        links = {"applied_instantiation_links": applied_instantiation_links}
        self.cli._dump_config()
        inner = of_the_module(self.cli.config_dump.get(self.key) or {})
        for key, value in applied_instantiation_links.items():
            _, ours, rest = key.partition(f"{self.key}.init_args.module.")
            if inner is not None and ours:
                _set_dict_nested(inner, rest.removeprefix("init_args."), value)
        with self.cli._noting(class_type, kwargs):
            if inner is None or issubclass(class_type, LocalLearner):
                return super().__call__(class_type, *args, **links, **kwargs)
            # The dump leaves out what is linked when it is parsed.
            plain = (int, float, str, type(None))
            inner = {**{k: v for k, v in kwargs.items() if isinstance(v, plain)}, **inner}
            with _given_hyperparameters_context(inner, "lightning.pytorch.cli.instantiate_module"):
                return class_type(*args, **kwargs)


def main(args: list[str] | None = None) -> None:
    """Runs `fit`, `validate`, `test`, `predict` or `plan`.

    Args:
        args: Command line without the program's name; default the process's.
    """
    # A console script does not see the working directory, where the user's classes are.
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["plan"]:
        # Not a method of the Trainer, whose devices need not be here.
        from lightning_local.plan_command import run_plan

        sys.exit(run_plan(given[1:]))
    LocalCLI(args=args)
