"""A training step on fake tensors: what it would need, without a device, data or arithmetic.

Everything that runs is what a fit runs (`batch_loop.py`, the couplings, the user's `training_step`
and optimizer), on tensors that have a shape and no storage; `meter.py` counts their bytes. The
optimizers have their states already, as after the first step of a fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from lightning_local.batch_loop import BatchLoop
from lightning_local.build import parameters_per_module
from lightning_local.couplings import Work
from lightning_local.fakes import convert_fakes, fake_copies
from lightning_local.links import InProcessLinks
from lightning_local.local_module import LocalModule
from lightning_local.message import Message
from lightning_local.meter import LiveBytes, existing
from lightning_local.objectives import per_item
from lightning_local.optim import recipes
from lightning_local.setting import ModuleBytes, Rehearsed, Setting
from lightning_local.substitute import Substitute, in_order, replaced
from lightning_local.wrapping import as_inputs, run_step

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner
    from lightning_local.methods import LocalMethod

__all__ = ["Rehearsal", "rehearse"]


def rehearse(
    learner: LocalLearner,
    modules: Sequence[LocalModule],
    method: LocalMethod,
    setting: Setting,
    *,
    origins: bool = False,
    fakes: FakeTensorMode | None = None,
) -> Rehearsed:
    """Runs a step on fake tensors and measures it.

    Args:
        learner: Whose module, network, optimizer and criterion; nothing of it changes.
        modules: Local modules on the learner's network; one, without a head, for end to end.
        method: Whose coupling and loss.
        setting: Batch and precision.
        origins: Whether to say which tensors are alive at the peak.
        fakes: The mode of heads that are fakes already.
    """
    mode = fakes or FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), isolate_rng(include_cuda=False):
        # Whatever the run warns of, a fit will too.
        warnings.simplefilter("ignore")
        module, own, criterion, configure = fake_copies(learner, modules, mode)
        with mode:
            loop = Rehearsal(learner, module, own, method, criterion, configure, setting)
            result = loop.measure()
            if origins:
                result = loop.measure(look_at=result.peak)
            return result


class Rehearsal(BatchLoop):
    """The loop on fake tensors; made and used under a `FakeTensorMode`."""

    def __init__(
        self,
        learner: LocalLearner,
        module: pl.LightningModule,
        modules: Sequence[LocalModule],
        method: LocalMethod,
        criterion: Any,
        configure: Callable[[], Any] | None,
        setting: Setting,
    ) -> None:
        super().__init__(modules, method.coupling, InProcessLinks())
        self.result = Rehearsed(modules=[ModuleBytes() for _ in range(self.num_modules)])
        self._setting, self._method, self._criterion = setting, method, criterion
        self._unpack = learner.unpack
        self._module = module
        name = learner.network_name
        self._network: nn.Module = module if name == "." else module.get_submodule(name)
        self._users = True
        self._live: LiveBytes | None = None
        module.train()
        dtype = setting.dtype
        if dtype is not None and not setting.mixed:
            for part in (module, *modules):
                convert_fakes(part, dtype)
        self._batch = setting.fake(setting.batch)
        self._made_up = setting.unpacked is not None
        own, heads = parameters_per_module(module, modules)
        self._parameters = list(zip(own, heads, strict=True))
        configure = configure or module.configure_optimizers
        shared = [module.trainer, *module.modules()]
        try:
            made = recipes(configure, learner.optimizer_callable, None, own, heads, shared)
            self._optimizers = self._with_states([optimizer for optimizer, _ in made])
        except Exception as error:
            self._note("the optimizer", "two numbers per parameter are taken for its state", error)
            params = [[*a, *b] for a, b in self._parameters]
            dummies = [each or [nn.Parameter(torch.empty(0))] for each in params]
            self._optimizers = self._with_states([torch.optim.AdamW(each) for each in dummies])

    def _with_states(self, optimizers: Sequence[torch.optim.Optimizer]) -> Any:
        """The optimizers as after a first step."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            if self.num_modules > 1 and not self._setting.accumulates:
                optimizer.zero_grad()
        return optimizers

    def _note(self, what: str, instead: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        self.result.notes.append(f"{what} can't run without numbers, so {instead}: {reason}")

    def _unpacked(self) -> tuple[Any, Any]:
        return self._batch if self._made_up else self._unpack(self._batch)

    def _run(self) -> None:
        inputs: tuple[Any, ...] = ()
        target = given = None
        if self.num_modules > 1:
            unpacked, target = self._unpacked()
            inputs = as_inputs(unpacked)
            given = inputs[0] if self._method.loss.needs_input else None
        self.links.send(0, Message(inputs, target, self._batch, 0, given))
        del inputs, given, target
        self.run_modules()

    def measure(self, look_at: int | None = None) -> Rehearsed:
        """A step; see `LiveBytes` for `look_at`."""
        result, everything = self.result, nn.ModuleList([self._module, *self.modules])
        tensors = existing(everything, self._optimizers, self._batch)
        self._live = LiveBytes(tensors, look_at)
        result.static = self._live.live
        handles = [
            handle for k, each in enumerate(self.modules) for handle in self._watched(k, each)
        ]
        try:
            with self._live:
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        result.peak = max(each.peak for each in result.modules)
        result.at_peak = self._live.alive
        for k, tensors_of in enumerate(self._parameters):
            own, head, state = result.modules[k], tensors_of[1], self._optimizers[k].state
            own.body, own.head = _size(tensors_of[0]), _size(head)
            own.gradient = _size(p for p in (*tensors_of[0], *head) if p.requires_grad)
            own.optimizer = _size(tree_leaves(list(state.values())))
        return result

    def _watched(self, k: int, module: LocalModule) -> list[Any]:
        """Hooks that see what the body's forward leaves."""
        own, live = self.result.modules[k], self._live
        assert live is not None
        start = 0

        def before(*_: Any) -> None:
            nonlocal start
            start = live.live

        def after(*_: Any) -> None:
            own.body_activation = live.live - start

        return [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ]

    def forward(self, k: int, message: Message) -> tuple[Work, tuple[Any, ...], Any]:
        """As always, with a look at what it leaves."""
        live, own = self._live, self.result.modules[k]
        start = live.live if live is not None else 0
        own.body_activation = 0
        found = super().forward(k, message)
        left = live.live - start if live is not None else 0
        if own.body_activation:
            own.head_activation = left - own.body_activation
        else:  # one module, which is the network itself
            own.body_activation = left
        return found

    def last_loss(
        self, message: Message, run: Callable[[], Any] | None
    ) -> tuple[torch.Tensor | None, Any]:
        """The user's `training_step`, or the criterion where fakes can't run that.

        End to end, gradients of the step before are released behind it, as Lightning does.
        """
        found = self._last_loss(message, run)
        if self.num_modules == 1 and not self._setting.accumulates:
            self._optimizers[0].zero_grad()
        return found

    def _last_loss(
        self, message: Message, run: Callable[[], Any] | None
    ) -> tuple[torch.Tensor | None, Any]:
        if self._users:
            try:
                return self._users_loss(message, run)
            except Exception as error:
                self._users = False
                self._note("training_step", "the criterion's is taken for the last loss", error)
        unpacked, target = self._unpacked()
        output = run() if run is not None else self._whole()(*as_inputs(unpacked))
        return self._criterions_loss(output, target), output

    def _users_loss(
        self, message: Message, run: Callable[[], Any] | None
    ) -> tuple[torch.Tensor | None, Any]:
        step, batch = self._module.training_step, message.batch
        if run is None:
            with replaced(self._network, "forward", self._whole()):
                return run_step(step, batch, 0, may_skip=False)[0], None
        network = Substitute(self._network, run, None)
        with network.active():
            loss, _ = run_step(step, batch, 0, may_skip=False)
        return loss, network.output

    def _whole(self) -> Callable[..., Any]:
        """The network that is trained end to end."""
        forward: Callable[..., Any] = self._network.forward
        if not self.modules or self.modules[0].recompute == "none":
            return forward
        return lambda *args, **kwargs: self.modules[0](*in_order(forward, args, kwargs))

    def _criterions_loss(self, output: Any, target: Any) -> torch.Tensor:
        try:
            loss: torch.Tensor = self._criterion(*per_item(output, target))
            if loss.requires_grad:
                return loss
        except Exception as error:
            note = f"The criterion does not take the network's output ({error}): its mean is used."
            if note not in self.result.notes:
                self.result.notes.append(note)
        tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        return torch.stack([t.float().mean() for t in tensors if t.is_floating_point()]).sum()

    def run_backward(self, loss: torch.Tensor, **options: Any) -> None:
        """Torch's own."""
        if loss.requires_grad:
            loss.backward(**options)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def step(self, k: int) -> None:
        """Steps optimizer k and releases a local module's gradients, as at the end of a window."""
        self._optimizers[k].step()
        if self.num_modules > 1:
            self._optimizers[k].zero_grad()

    @contextmanager
    def around(self, k: int) -> Iterator[None]:
        """The precision's contexts, and a peak of k's own."""
        setting = self._setting
        with ExitStack() as stack:
            stack.enter_context(self._peak_of(k))
            if setting.mixed:
                stack.enter_context(torch.autocast("cpu", dtype=setting.dtype))
            yield

    def around_finish(self, k: int) -> AbstractContextManager[Any]:
        """A peak of k's own."""
        return self._peak_of(k)

    @contextmanager
    def _peak_of(self, k: int) -> Iterator[None]:
        if self._live is None:
            yield
            return
        self._live.peak, self._live.place = self._live.live, f"local module {k}"
        yield
        own = self.result.modules[k]
        own.peak = max(own.peak, self._live.peak)

    def outside_precision(self) -> AbstractContextManager[Any]:
        """Backward and step run without autocast."""
        return torch.autocast("cpu", enabled=False) if self._setting.mixed else nullcontext()


def _size(tensors: Iterable[Any]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))
