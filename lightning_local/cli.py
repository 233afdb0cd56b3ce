"""The command line: `lightning-local` and `python -m lightning_local`."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, _InstantiatorFn
from lightning.pytorch.core.mixins.hparams_mixin import (
    _given_hyperparameters,
    _given_hyperparameters_context,
)

from lightning_local import couplings, heads, losses, methods
from lightning_local.learner import LocalLearner
from lightning_local.wrapper import of_the_module

__all__ = ["LocalCLI", "main"]


class LocalCLI(LightningCLI):
    """LightningCLI for learners and datamodules given by `class_path`.

    The module inside has its own hyper-parameters, as if it were the CLI's model; a checkpoint
    never changes what the configuration says is built.

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
            "parser_class": _Parser,
        }
        given = dict(zip(("model_class", "datamodule_class"), args, strict=False))
        super().__init__(*args[2:], **{**defaults, **given, **kwargs})

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
        inner, own = _options(module_class), {}
        for name, parameter in _options(LocalLearner).items():
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


class _ModuleInside(_InstantiatorFn):
    def __call__(
        self,
        class_type: Any,
        *args: Any,
        applied_instantiation_links: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        self.cli._dump_config()
        inner = of_the_module(self.cli.config_dump.get(self.key) or {})
        if inner is None or issubclass(class_type, LocalLearner):
            return super().__call__(
                class_type, *args, applied_instantiation_links=applied_instantiation_links, **kwargs
            )
        with _given_hyperparameters_context(inner, "lightning.pytorch.cli.instantiate_module"):
            return class_type(*args, **kwargs)


def _options(owner: type) -> dict[str, inspect.Parameter]:
    """The constructor's named parameters, with their types resolved."""
    # mypy fears that a subclass has another __init__; it is this class's that is asked for.
    parameters = inspect.signature(owner.__init__, eval_str=True).parameters  # type: ignore[misc]
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


class _Parser(LightningArgumentParser):
    """Says what is wrong, without the usage and the whole configuration around it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = _shortened(message)
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {text}\n{_suggestion(message)}")
        raise AssertionError("exit does not return")


def _shortened(message: str) -> str:
    """A parser's message without dumps of the configuration and repeated alternatives."""
    message = re.sub(r"Namespace\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "...", message)
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    kept = list(dict.fromkeys(line for line in lines if len(line) < 400))
    return "\n".join(kept[:12] + (["  ..."] if len(kept) > 12 else []))


@functools.cache
def _names() -> list[str]:
    """What a user of this package may have meant."""
    pieces = [getattr(m, n) for m in (heads, losses, couplings) for n in m.__all__]
    classes = [*methods.METHODS.values(), LocalLearner, *pieces]
    kinds = [kind for kind in classes if isinstance(kind, type)]
    options = [name for kind in kinds for name in _options(kind)]
    return sorted({*options, *(kind.__name__ for kind in kinds), "Partition", "LocalSummary"})


_UNKNOWN = (
    r"Option '([\w.]+)' is not accepted",
    r"Expected a path but ([\w.]+) either not accessible",
    r"Unrecognized arguments: --([\w.]+)",
    r"has no attribute '([\w.]+)'",
)


def _suggestion(message: str) -> str:
    """The name closest to one that a message calls unknown."""
    for word in (found for pattern in _UNKNOWN for found in re.findall(pattern, message)):
        last = word.rpartition(".")[2]
        close = difflib.get_close_matches(last, _names(), 1, 0.7)
        if close and close[0] != last:
            return f"Did you mean {close[0]!r}, not {last!r}?\n"
    return ""


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
