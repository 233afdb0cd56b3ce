"""A LightningModule that answers for the user's: attributes, logging, hyper-parameters, state.

What trains is not here.
"""

from __future__ import annotations

import copy
import pydoc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.trainer import call
from torch import nn

from lightning_local.links import InProcessLinks, Links

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Wrapper", "of_the_module"]


def of_the_module(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The hyper-parameters of the module inside, as a LightningCLI stores those of its model.

    Args:
        config: Of a model; with `class_path`, or as the CLI flattens it.

    Returns:
        None if it is not the configuration of a learner around a `class_path`.
    """
    path = str(config.get("class_path", config.get("_class_path", "")))
    inner = config.get("init_args", config).get("module")
    kind = pydoc.locate(path)
    learner = issubclass(kind, Wrapper) if isinstance(kind, type) else path == "LocalLearner"
    if not learner or not isinstance(inner, Mapping):
        return None
    options = {**inner.get("init_args", {}), **inner.get("dict_kwargs", {})}
    return {"_class_path": inner["class_path"], **options} if "class_path" in inner else None


class Wrapper(pl.LightningModule):
    """Stands in the Trainer for the module inside.

    Args:
        module: The user's module.

    Attributes:
        network_name: Path of the submodule that is cut, `"."` for the module's own forward.
    """

    module: pl.LightningModule
    links: Links

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.links = InProcessLinks()
        self.module = module
        self.network_name = ""
        self.prepare_data_per_node = module.prepare_data_per_node
        self.example_input_array = module.example_input_array
        self.strict_loading = module.strict_loading
        self._log_hyperparams = module._log_hyperparams
        self.made_by_cli = _given_hyperparameters.get() is not None
        if self.made_by_cli:
            self._give_own_hparams()

    def _give_own_hparams(self) -> None:
        """A LightningCLI gives every LightningModule it makes the options of its whole model."""
        hparams = self.module.hparams
        inner = of_the_module(dict(hparams))
        if inner is not None and "_instantiator" in hparams:
            inner["_instantiator"] = hparams["_instantiator"]
            hparams.clear()
            hparams.update(inner)
            self.module.__dict__["_hparams_initial"] = copy.deepcopy(hparams)

    @property
    def network(self) -> nn.Module:
        """The module that is cut."""
        if self.network_name == ".":
            return self.module
        return self.module.get_submodule(self.network_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The user's module's forward."""
        return self.module(*args, **kwargs)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """As Lightning's, where the data are read; elsewhere there is no batch yet."""
        if not self.links.first:
            return batch
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        """As Lightning's, which asks whether they are of the class of the module that is asked."""
        trainer = self._trainer
        if trainer is not None:
            selector = trainer._data_connector._datahook_selector
            if selector is not None and selector.get_instance(hook_name) is self.module:
                return call._call_lightning_module_hook(trainer, hook_name, *args)
        return super()._call_batch_hook(hook_name, *args)

    def __getattr__(self, name: str) -> Any:
        """What only the user's module has, for callbacks that read it off the Trainer's module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            # What the class has is not looked for: there a property of its own has failed.
            if module is None or name.startswith("__") or hasattr(type(self), name):
                raise
            return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What a run's callbacks set on the Trainer's module belongs to the user's module.

        Its `training_step` reads it there. The learner keeps what it has itself, and what is
        private and not the module's.
        """
        if name == "_current_fx_name":  # the property below, past what nn.Module looks for first
            object.__setattr__(self, name, value)
            return
        module = self.__dict__.get("_modules", {}).get("module")
        if name == "module" and module is not None and value is not module:
            raise ValueError(
                "A learner keeps the module that it wraps, whose hooks it has taken over: wrap the "
                "other one in a new LocalLearner."
            )
        theirs = (
            self.__dict__.get("_trainer") is not None
            and module is not None
            and name not in self.__dict__
            and name not in self._modules
            and not hasattr(type(self), name)
            and (hasattr(module, name) or not name.startswith("_"))
        )
        if theirs:
            setattr(module, name, value)
        else:
            super().__setattr__(name, value)

    def eval(self) -> Self:
        """Evaluation mode; the user's module may have an `eval` of its own."""
        self.training = False
        for child in self.children():
            child.eval()
        return self

    # Lightning sets it around each hook, and `self.log` asks for it.
    @property
    def _current_fx_name(self) -> str | None:
        name: str | None = self.__dict__.get("_hook")
        return name

    @_current_fx_name.setter
    def _current_fx_name(self, name: str | None) -> None:
        """Tells the user's module too, so that its own `log` works in its hooks."""
        self.__dict__["_hook"] = name
        module = self.__dict__.get("_modules", {}).get("module")
        if module is not None:
            # Past Module.__setattr__: Lightning comes here 16 times per local module and batch.
            module.__dict__["_current_fx_name"] = name

    @property
    def hparams(self) -> Any:
        """The user's module's hyper-parameters: loggers and tuners see the plain run's."""
        return self.module.hparams

    @property
    def hparams_initial(self) -> Any:
        """The user's module's, as they were saved first."""
        return self.module.hparams_initial

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses, since a checkpoint is one of the user's module.

        Raises:
            TypeError: Always; says what to call instead.
        """
        raise TypeError(
            "A checkpoint of a LocalLearner is one of the module inside: load it with that class's "
            "load_from_checkpoint. To go on training or to evaluate, build the LocalLearner again "
            "and pass ckpt_path=... to trainer.fit, validate, test or predict."
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads the user's module as it loads itself, and the rest beside it.

        Args:
            state_dict: Keys of the user's module behind `module.`, the others' as they are.
            strict: Whether keys have to match.
            assign: Whether tensors are taken over instead of copied.

        Returns:
            What `load_state_dict` of the user's module returns.

        Raises:
            RuntimeError: The heads are others, or the user's module refuses its part.
        """
        prefix = "module."
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        rest = {k: v for k, v in state_dict.items() if not k.startswith(prefix)}
        kept = {f"{prefix}{k}": v for k, v in self.module.state_dict().items()}
        wrong = super().load_state_dict({**kept, **rest}, strict=False, assign=assign)
        missing = [name for name in wrong.missing_keys if not name.startswith(prefix)]
        if strict and (missing or wrong.unexpected_keys):
            raise RuntimeError(
                f"The state has other heads than the learner: missing {missing}, not known "
                f"{wrong.unexpected_keys}."
            )
        return self.module.load_state_dict(own, strict=strict, assign=assign)
