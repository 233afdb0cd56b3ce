"""From a learner's arguments to its local modules: cuts and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_local.arguments import recompute_modes
from lightning_local.body import prediction
from lightning_local.cutting import Cutter, Cutting
from lightning_local.examples import follows, outputs_behind, parts_outside
from lightning_local.fakes import convert_fakes, faking
from lightning_local.local_module import LocalModule
from lightning_local.methods.base import LocalMethod
from lightning_local.objectives import Objective
from lightning_local.partition import Partition, choose_points
from lightning_local.place import Place, Unit
from lightning_local.randomness import seed_for
from lightning_local.trial import try_modules

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = [
    "Builder",
    "builder_of",
    "check_same",
    "form_of",
    "parameters_per_module",
    "step_flops",
]

_ASKED = ("method", "partition", "recompute", "out_features")


class Builder:
    """Makes the local modules of a network, for any cut.

    Args:
        network: The network.
        request: Where the user wants it to be cut.
        method: Whose heads and losses.
        inputs: The network's positional inputs, of any batch size.
        name: The network's name in errors.
        criterion: The heads' task loss.
        out_features: Number of their outputs, None for the network's.
        seed: Each head is initialised from its own, on the CPU, and leaves the global generator
            alone.

    Attributes:
        cutter: The traced network.
        followed: Whether other layers may make the prediction from the network's output.
        behind: Whether they do: the user's forward makes something of it.

    Raises:
        ValueError: The network can't be cut as asked.
    """

    def __init__(
        self,
        network: nn.Module,
        request: Partition,
        method: LocalMethod,
        inputs: Sequence[Any],
        *,
        name: str,
        criterion: Any,
        out_features: int | None,
        seed: int,
    ) -> None:
        self.network, self.request, self.method, self.name = network, request, method, name
        self._criterion, self._out_features, self._seed = criterion, out_features, seed
        floating = (p for p in network.parameters() if p.is_floating_point())
        self._like = next(floating, torch.empty(0))
        # The data may be in the precision that the network will have once the fit starts.
        self.inputs = [
            v.to(self._like.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for v in inputs
        ]
        self.cutter = Cutter(network, request, self.inputs, name)
        self.followed = self.behind = False

    def points(self, request: Partition | None = None) -> tuple[str, ...]:
        """Split points of a request whose local modules have equal numbers of units."""
        request = request or self.request
        if request.split_points is not None:
            return tuple(request.split_points)
        tail = self.method.head.tail_units if self.method.head is not None else 0
        cutter = self.cutter
        return choose_points(cutter.unit_points, request, tail, self.name, cutter.obstacle)

    def make(
        self,
        points: Sequence[str],
        recompute: str | Mapping[int, str] = "none",
        fakes: FakeTensorMode | None = None,
    ) -> tuple[Cutting, list[LocalModule]]:
        """Cuts, and makes the heads.

        Args:
            points: Where to cut.
            recompute: See `LocalLearner`.
            fakes: For heads without memory, whose tensors are of this mode.

        Raises:
            ValueError: It can't be cut there, the heads' size can't be seen, or `recompute` names
                a local module that is not there.
        """
        cutting = self.cutter.cut(points)
        modules = self._with_heads(cutting, fakes)
        modes = recompute_modes(recompute, len(modules))
        for module, mode, pieces in zip(modules, modes, cutting.pieces, strict=True):
            module.recompute = mode
            module.pieces = pieces if mode == "blocks" else ()
        try_modules(self.network, modules, self.inputs, fakes)
        return cutting, modules

    def whole(self, points: Sequence[str]) -> LocalModule:
        """The network as one module that recomputes the stretches between `points`."""
        module = LocalModule(self.cutter.cut(()).bodies[0], None, None)
        module.recompute, module.pieces = "blocks", self.cutter.stretches(points)
        try_modules(self.network, [module], self.inputs)
        return module

    def _with_heads(self, cutting: Cutting, fakes: FakeTensorMode | None) -> list[LocalModule]:
        """Makes the heads, with the type of the network and where it is."""
        last = LocalModule(cutting.bodies[-1], None, None)
        last.followed, last.behind = self.followed, self.behind
        return [*(self.head_at(cutting, k, fakes) for k in range(len(cutting.bodies) - 1)), last]

    def head_at(self, cutting: Cutting, k: int, fakes: FakeTensorMode | None = None) -> LocalModule:
        """Local module k, which is not the last, with its head."""
        method, seed = self.method, seed_for(self._seed, -2 - k)
        assert method.head is not None
        output = prediction(cutting.output)
        features, pools = _output_form(output, self._out_features, self.name)
        place = self._place(cutting, k, features, pools)
        embedding = method.loss.embedding
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), faking(fakes):
            torch.default_generator.manual_seed(seed)
            head: nn.Module = nn.Identity()
            if embedding is None or embedding > 0:
                size = features if embedding is None else embedding
                head = method.head.build(dataclasses.replace(place, out_features=size))
                rank = output.ndim if isinstance(output, torch.Tensor) else None
                if embedding is None and rank == 1 and self._out_features is None:
                    head = nn.Sequential(head, nn.Flatten(0))
            objective = method.loss.build(place, self._criterion)
            if not isinstance(objective, Objective):
                kinds = type(method.loss).__name__, type(objective).__name__
                raise TypeError(
                    f"{kinds[0]}.build returned a {kinds[1]}: it has to return a losses.Objective."
                )
            for each in (head, objective):
                if fakes is None:
                    each.to(self._like.device, self._like.dtype)
                else:
                    convert_fakes(each, self._like.dtype)
        return LocalModule(cutting.bodies[k], head, objective)

    def _place(self, cutting: Cutting, k: int, features: int, pools: bool) -> Place:
        given = self.inputs[0] if self.inputs else None
        shape = torch.empty_like(given, device="meta") if isinstance(given, torch.Tensor) else None
        unit, last = cutting.last_unit[k], len(cutting.units) - 1
        forms = (*cutting.unit_boundaries, None)
        later = [
            Unit(cutting.units[u], forms[u - 1], forms[u], last=u == last)
            for u in range(unit + 1, last + 1)
        ]
        form = cutting.boundaries[k]
        return Place(k, len(cutting.bodies), form, features, pools, unit, later, shape)


def builder_of(learner: LocalLearner, inputs: Any, partition: Partition, seed: int) -> Builder:
    """What makes a learner's local modules, for inputs of its network."""
    builder = Builder(
        learner.network,
        partition,
        learner.method,
        inputs,
        name=learner.network_name,
        criterion=learner._criterion[0],
        out_features=learner.out_features or _outputs(learner, inputs),
        seed=seed,
    )
    # A part outside may be a classifier, or a teacher or a decoder beside the network, and nothing
    # but a step of the user's would tell. With as many outputs as the user says there are classes,
    # the network's own is the prediction, unless forward makes something of it.
    output = prediction(builder.cutter.output)
    width = output.shape[-1] if isinstance(output, torch.Tensor) and output.ndim else None
    builder.behind = follows(learner, builder.inputs)
    builder.followed = builder.behind or (
        bool(parts_outside(learner)) and width != learner.out_features
    )
    return builder


def _outputs(learner: LocalLearner, inputs: Any) -> int | None:
    """For heads, if there will be some."""
    return outputs_behind(learner, inputs) if learner.method.head is not None else None


def step_flops(learner: LocalLearner) -> list[float]:
    """FLOPs of a training step of each local module, per sample; backwards by formula.

    What is computed twice to save memory is not counted.
    """
    coupling, flops = learner.method.coupling, []
    for k, module in enumerate(learner.modules_in_order()):
        body, head = module.body_flops, module.head_flops
        units = max(1, len(module.body.units))
        backward = coupling.backward_flops(body, head, units=units, first=k == 0)
        flops.append(body + head + backward)
    return flops


def form_of(learner: LocalLearner) -> dict[str, Any]:
    """What a learner's local modules were made of, for `check_same`."""
    asked = {name: getattr(learner, name) for name in _ASKED}
    return {**asked, "unused": _unused(learner)}


def _unused(learner: LocalLearner) -> set[str]:
    """Names of layers with parameters that no body calls."""
    called = [path for module in learner.modules_in_order() for path in module.body.used]
    return {
        name
        for name, layer in learner.network.named_modules()
        if name
        and any(True for _ in layer.parameters(recurse=False))
        and not any(name == path or name.startswith(f"{path}.") for path in called)
    }


def check_same(learner: LocalLearner, before: Mapping[str, Any]) -> None:
    """Looks whether local modules still are what the learner has been asked for.

    Raises:
        ValueError: They are of another network or method; a layer that was replaced is fine.
    """
    changed = [name for name in _ASKED if before[name] != getattr(learner, name)]
    if learner.modules_in_order()[0].body.network is not learner.network:
        changed.append("network")
    elif new := sorted(_unused(learner) - before["unused"]):
        changed.append(f"network, without `{new[0]}`")
    if changed:
        raise ValueError(
            f"The learner was cut before with another {', another '.join(changed)}: wrap the "
            "module in a new LocalLearner, whose heads are new too."
        )


def parameters_per_module(
    module: nn.Module, modules: Sequence[LocalModule]
) -> tuple[list[list[nn.Parameter]], list[list[nn.Parameter]]]:
    """For each local module its parameters of the user's module, and those of its head.

    What lies outside the network belongs to the last local module; without local modules,
    everything belongs to the one there is.
    """
    if len(modules) < 2:
        return [list(module.parameters())], [[]]
    bodies = [list(each.body.parameters()) for each in modules]
    taken = {id(p) for parameters in bodies for p in parameters}
    bodies[-1].extend(p for p in module.parameters() if id(p) not in taken)
    # A body registers nothing, so a local module's own parameters are its head's.
    return bodies, [list(each.parameters()) for each in modules]


def _output_form(output: Any, out_features: int | None, name: str) -> tuple[int, bool]:
    """Number of logits and whether heads pool, by the rank of the network's output."""
    tensor = isinstance(output, torch.Tensor)
    if tensor and output.ndim == 1 and out_features is None:  # a number per sample
        return 1, True
    if tensor and output.ndim in (2, 3):
        return out_features or output.shape[-1], output.ndim == 2
    if out_features is not None:
        return out_features, True
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    raise ValueError(
        f"`{name}` returns {shape}; heads predict a number or a vector per sample, (N,) or (N, C), "
        "or one per token, (N, T, V). Pass LocalLearner(out_features=...) for heads that predict "
        "per sample, with a criterion that takes (N, out_features)."
    )
