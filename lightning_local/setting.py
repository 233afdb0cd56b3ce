"""Under which conditions a step is rehearsed, and what it was found to need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_local.body import prediction
from lightning_local.build import Builder, builder_of
from lightning_local.meter import Origin
from lightning_local.wrapper import Wrapper
from lightning_local.wrapping import as_inputs

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["ModuleBytes", "Rehearsed", "Setting", "prepared"]

# Fakes take bfloat16 for both 16-bit types.
_DTYPES = {"64": torch.float64, "32": None, "16": torch.bfloat16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """Under which conditions a step is rehearsed.

    Args:
        batch: The user's batch, of any number of samples.
        batch_size: Number of samples to rehearse with.
        precision: As the Trainer's.
        accumulates: Whether gradients of earlier batches are kept, as in an accumulation window.
        unpacked: Input and target, for a batch that was made up.
    """

    batch: Any
    batch_size: int
    precision: str = "32-true"
    accumulates: bool = False
    unpacked: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        """Checks the precision."""
        kind, _, form = str(self.precision).partition("-")
        if kind not in _DTYPES or form not in ("", "true", "mixed"):
            raise ValueError(
                f"precision={self.precision!r} can't be planned for: pass '32-true', '64-true', "
                "'16-mixed', 'bf16-mixed', '16-true' or 'bf16-true'."
            )

    @staticmethod
    def without_data(
        learner: LocalLearner, builder: Builder, batch_size: int | None = None, **options: Any
    ) -> Setting:
        """With the network's inputs, and targets of the form that the criterion takes.

        Args:
            learner: Whose criterion.
            builder: Whose inputs.
            batch_size: Default that of the inputs.
            options: See `Setting`.
        """
        inputs, output = builder.inputs, prediction(builder.cutter.output)
        first = inputs[0]
        samples = first.shape[0] if isinstance(first, torch.Tensor) and first.ndim else 1
        target = torch.zeros(samples, dtype=torch.int64)
        if isinstance(output, torch.Tensor) and output.ndim > 1:
            classes = isinstance(learner._criterion[0], (nn.CrossEntropyLoss, nn.NLLLoss))
            # Classes come first in maps, last in tokens.
            rest = output.shape[2:] if output.ndim > 3 else output.shape[1:-1]
            shape, kind = (rest, torch.int64) if classes else (output.shape[1:], output.dtype)
            target = torch.zeros((samples, *shape), dtype=kind)
        given = inputs[0] if len(inputs) == 1 else tuple(inputs)
        pair = (given, target)
        return Setting(pair, batch_size or samples, unpacked=pair, **options)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that a precision uses instead of float32, if any."""
        return _DTYPES[str(self.precision).partition("-")[0]]

    @property
    def mixed(self) -> bool:
        """Whether weights stay in float32."""
        return str(self.precision) in ("16", "bf16", "16-mixed", "bf16-mixed")

    def fake(self, given: Any) -> Any:
        """Fakes of the batch size in the place of the samples that are there."""
        dtype = None if self.mixed else self.dtype
        tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor) and t.ndim]
        samples = tensors[0].shape[0] if tensors else 0

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            shape = list(tensor.shape)
            if shape and shape[0] == samples:
                shape[0] = self.batch_size
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            return torch.empty(shape, dtype=kind)

        return tree_map_only(torch.Tensor, fake, given)


@dataclass
class ModuleBytes:
    """What one local module needs in a step; all in bytes.

    Attributes:
        body: Parameters of the body; for the last local module of all that is no other's.
        head: Parameters of head and loss.
        gradient: Gradients of both.
        optimizer: Optimizer state of both.
        body_activation: What the forward of the body leaves for its backward, the input not
            counted.
        head_activation: The same of head and loss.
        peak: The most that is alive during its share of the step, the other modules' parameters
            and optimizer states included.
    """

    body: int = 0
    head: int = 0
    gradient: int = 0
    optimizer: int = 0
    body_activation: int = 0
    head_activation: int = 0
    peak: int = 0


@dataclass
class Rehearsed:
    """What a step would need.

    Attributes:
        peak: The most bytes that are alive at once.
        static: Bytes of parameters, buffers, optimizer states and the batch.
        modules: One entry per local module.
        at_peak: The tensors that are alive at the peak, largest first, if they were asked for.
        notes: What could not be rehearsed as it would run.
    """

    peak: int = 0
    static: int = 0
    modules: list[ModuleBytes] = field(default_factory=list)
    at_peak: list[Origin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepared(learner: LocalLearner, batch: Any, batch_size: int | None) -> tuple[Builder, Setting]:
    """What cuts a learner's network anywhere, and the batch.

    Args:
        learner: Its partition says what may be cut.
        batch: The user's, of any number of samples; None for the module's example.
        batch_size: Number of samples; None for those of the batch.

    Raises:
        TypeError: It is no learner.
        ValueError: There is neither batch nor example, or the method has no local modules.
    """
    if not isinstance(learner, Wrapper):
        raise TypeError(
            f"plan_partition({type(learner).__name__}): pass a LocalLearner around your module; "
            "its method is what is planned for."
        )
    if learner.method.head is None:
        raise ValueError(
            f"{type(learner.method).__name__} has no local modules to plan: give the learner the "
            "method that you would train with, such as 'AugLocal'."
        )
    if learner.whole:
        raise ValueError(
            "This learner's partition is 1, so there is nothing to plan: leave partition out, or "
            "pass 'units'."
        )
    if not learner.network_name:
        learner._find_network()  # what setup or configure_model makes has to be there
    example = learner.module.example_input_array if batch is None else None
    if batch is None and example is None:
        raise ValueError(
            "plan_partition needs the form of the network's input: pass a batch, or set "
            "example_input_array in the wrapped module."
        )
    inputs = as_inputs(example if batch is None else learner.unpack(batch)[0])
    request = replace(learner.partition, num_modules=None, split_points=None, balance="units")
    builder = builder_of(learner, _few(inputs), request, torch.initial_seed())
    first = inputs[0]
    samples = first.shape[0] if isinstance(first, torch.Tensor) and first.ndim else 1
    if batch is None:
        return builder, Setting.without_data(learner, builder, batch_size or samples)
    return builder, Setting(batch, batch_size or samples)


def _few(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Two samples are enough for shapes."""
    return tuple(v[:2] if isinstance(v, torch.Tensor) and v.ndim else v for v in inputs)
