"""An input of the network, for the dry run: from the user's example, or from the training data.

Looking at the data leaves it as it was: no batch is lost, and no order changes that torch's
generators make.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from lightning_local.fake_run import on_fakes
from lightning_local.preserving import training_mode
from lightning_local.substitute import in_order, inputs_of_call, replaced
from lightning_local.wrapping import as_inputs

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = [
    "batch_size",
    "example_inputs",
    "follows",
    "answer_for_itself",
    "let_go",
    "outputs_behind",
    "parts_outside",
    "samples_of",
]

_logger = logging.getLogger(__name__)
_SET_ONE = "set example_input_array in the wrapped module"


def example_inputs(learner: LocalLearner) -> tuple[Any, ...]:
    """What the network is called with: by the module's forward, else by a training step.

    Raises:
        ValueError: There is no example, and no data that can be looked at.
    """
    device = next((p.device for p in learner.network.parameters()), torch.device("cpu"))
    example = learner.module.example_input_array
    if example is not None:
        return _through_forward(learner, move_data_to_device(example, device))
    loader = _loader(learner)
    with isolate_rng():
        batch = _two_samples(loader)
        batch = learner._apply_batch_transfer_handler(batch, device=device)
        return as_inputs(learner.unpack(batch)[0])


def batch_size(learner: LocalLearner) -> int | None:
    """Number of samples in a batch, where the training dataloader tells."""
    try:
        loader = _loader(learner)
    except ValueError:
        return None
    return _size_of(loader)


def samples_of(loader: Any) -> tuple[Any, int | None]:
    """A batch of two samples, and how many a batch of the loader has."""
    with isolate_rng():
        return _two_samples(loader), _size_of(loader)


def _size_of(loader: Any) -> int | None:
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int):
            return size
    return None


def parts_outside(learner: LocalLearner) -> list[str]:
    """Names of the parts of the user's module that have parameters the network has not."""
    inside = {id(p) for p in learner.network.parameters()}
    return [
        path
        for path, child in learner.module.named_children()
        if any(id(p) not in inside for p in child.parameters())
    ]


def outputs_behind(learner: LocalLearner, inputs: tuple[Any, ...]) -> int | None:
    """The number of outputs of the user's forward, where layers follow the network that is cut.

    Args:
        learner: Its module's forward is run, in eval mode and with zeros for the network's output.
        inputs: Of the network.

    Returns:
        None where nothing with parameters follows, or a criterion of the user's own says what heads
        have to give.

    Raises:
        ValueError: Something follows, and the module's forward does not tell what comes out.
    """
    others = parts_outside(learner)
    if not others or not learner.default_criterion:
        return None
    output = _behind(learner, inputs)
    if isinstance(output, torch.Tensor) and output.ndim in (2, 3):
        return output.shape[-1]
    raise ValueError(
        f"network={learner.network_name!r} is not all of {type(learner.module).__name__}, which "
        f"has parameters in {', '.join(others)} too, so the size of its output need not be the "
        "number of classes: pass LocalLearner(out_features=...), the outputs of the heads."
    )


def follows(learner: LocalLearner, inputs: Sequence[Any]) -> bool:
    """Whether the user's forward, as far as it can be run, makes something of the output."""
    return bool(parts_outside(learner)) and _behind(learner, inputs) is not None


def _behind(learner: LocalLearner, inputs: Sequence[Any]) -> Any:
    """What the user's forward makes of zeros in the place of the network's output.

    None where it fails, or returns them: then whatever follows is not in forward.
    """
    module, network = learner.module, learner.network
    shapes = on_fakes(network, lambda host, *values: host(*values), list(inputs), False)
    zeros = tree_map_only(
        torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=t.device), shapes
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        return zeros

    try:
        with (
            isolate_rng(),
            torch.no_grad(),
            replaced(network, "forward", call),
            training_mode(module, False),
        ):
            output = module.forward(*inputs)
    except Exception as error:
        _logger.info("the user's forward did not run behind the network: %s", error)
        return None
    return None if output is zeros else output


def answer_for_itself(learner: LocalLearner) -> None:
    """After a run, the user's module finds its own transfer hooks, to be exported for example.

    Lightning looks for them in the Trainer's module, and for those of another class in a
    datamodule.
    """
    # Lightning's own object behind batch hooks; a new one in each run.
    selector = learner.trainer._data_connector._datahook_selector
    if selector is not None:
        selector.model = learner.module


def let_go(trainer: Any) -> None:
    """Takes off what waits for Lightning to ask for a dataloader, in case it did not."""
    for loop in (
        trainer.fit_loop,
        trainer.validate_loop,
        trainer.test_loop,
        trainer.predict_loop,
    ):
        loop._data_source.__dict__.pop("dataloader", None)


def _through_forward(learner: LocalLearner, example: Any) -> tuple[Any, ...]:
    """Lightning's example is for the module's forward, which may prepare the network's input."""
    args = () if isinstance(example, Mapping) else as_inputs(example)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    network = learner.network
    forward = network.forward
    if network is learner.module or not is_overridden("forward", learner.module):
        return in_order(forward, args, kwargs)

    with isolate_rng(), torch.no_grad():
        found = inputs_of_call(network, lambda: learner.module.forward(*args, **kwargs))
    return in_order(forward, args, kwargs) if found is None else found


def _loader(learner: LocalLearner) -> Any:
    """The training dataloader, or that of another loop that runs now."""
    trainer = learner.trainer
    loops: dict[str, Any] = {
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    running = trainer.state.fn.value if trainer.state.fn is not None else "fit"
    source = loops.get(running, trainer.fit_loop)._data_source
    if not source.is_defined():
        raise ValueError(
            f"The local modules' shapes can't be found without an input: {_SET_ONE}, or give the "
            "Trainer a train_dataloader."
        )
    loader = _request_dataloader(source)
    before = source.__dict__.get("dataloader")

    def dataloader() -> Any:
        """Lightning asks next; the user's hook made the loader already."""
        source.__dict__.pop("dataloader", None)
        return loader if before is None else before()

    source.__dict__["dataloader"] = dataloader
    if isinstance(loader, (list, tuple)) and source is not trainer.fit_loop._data_source:
        return loader[0]
    if isinstance(loader, (dict, list, tuple)):
        raise ValueError(
            f"Several training dataloaders: {_SET_ONE}, so that the shapes of the local modules "
            "don't have to be found from their batches."
        )
    return loader


def _two_samples(loader: Any) -> Any:
    """A batch of two samples (of any size from a loader that is not torch's).

    The dataset is asked itself, without workers; generators that samplers have are set back.
    """
    try:
        if not isinstance(loader, DataLoader):
            return next(_fresh(loader))
        if isinstance(loader.dataset, IterableDataset):
            stream = _fresh(loader.dataset)
            if loader.batch_size is None:
                return loader.collate_fn(next(stream))
            return loader.collate_fn(list(islice(stream, 2)) or [next(stream)])
        with _generators_kept(loader):
            if loader.batch_sampler is None:
                return loader.collate_fn(loader.dataset[next(iter(loader.sampler))])
            indices = next(iter(loader.batch_sampler))[:2]
        # As torch's own loader asks a dataset for a batch.
        together = getattr(loader.dataset, "__getitems__", None)
        samples = together(indices) if together else [loader.dataset[i] for i in indices]
        return loader.collate_fn(samples)
    except StopIteration:
        raise ValueError(
            "The training dataloader is empty: it has to give at least one batch."
        ) from None


def _fresh(iterable: Any) -> Iterator[Any]:
    iterator: Iterator[Any] = iter(iterable)
    if iterator is iterable:
        raise ValueError(
            f"The training data is a {type(iterable).__name__} that can be read only once, and to "
            f"find the shapes of the local modules a batch would be lost: {_SET_ONE}."
        )
    return iterator


@contextmanager
def _generators_kept(loader: DataLoader[Any]) -> Iterator[None]:
    owners = [loader, loader.sampler, loader.batch_sampler]
    owners.append(getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    generators = [g for g in found if isinstance(g, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
