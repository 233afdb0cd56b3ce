"""The training loop of a fit: what the Trainer asks of the steps in `batch_loop.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_local.batch_loop import BatchLoop
from lightning_local.compiling import Compiled
from lightning_local.couplings import Work
from lightning_local.evaluation import no_stop
from lightning_local.fake_run import check_real
from lightning_local.first_batch import check_graph, check_reach, first_loss
from lightning_local.local_module import LocalModule
from lightning_local.message import Message
from lightning_local.meter import existing
from lightning_local.metrics import LocalMetrics
from lightning_local.objectives import ignored_index
from lightning_local.precision import LossScalers, outside_precision
from lightning_local.publisher import Publisher
from lightning_local.randomness import set_global_states
from lightning_local.saving import SavingByStep, load_waiting_loaders
from lightning_local.schedules import Schedules
from lightning_local.state import Resumed
from lightning_local.stepping import Stepping
from lightning_local.substitute import Expected, Substitute, in_order, replaced
from lightning_local.watching import Watch
from lightning_local.wrapping import as_inputs, run_step

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["TrainingLoop"]


class TrainingLoop(BatchLoop):
    """Runs batches through the local modules of one fit.

    Args:
        learner: Whose local modules; its `links` say where the neighbours are.
    """

    def __init__(self, learner: LocalLearner) -> None:
        super().__init__(learner.modules_in_order(), learner.method.coupling, learner.links)
        self.learner, self.trainer, self.device = learner, learner.trainer, learner.device
        ignored, count = ignored_index(learner._criterion[0]), self.num_modules
        self.metrics = LocalMetrics(count, self.device, ignored)
        self.scalers = LossScalers(self.trainer, count)
        self._compiled = Compiled(learner)
        self.stepping = Stepping(learner, self.scalers, self.owned)
        self.watch = Watch(self.trainer, self.num_modules)
        self._first = True
        self._random: dict[str, Any] | None = None
        self._dtype = torch.get_default_dtype()
        self._expected: Expected | None = None
        self._result: Any = None
        self._means: dict[int, Callable[[], None]] = {}
        # Last, since they hang themselves on the Trainer, which only `close` undoes.
        self.schedules = Schedules(learner, learner.configs)
        self._saving = SavingByStep(learner)
        self._publisher = Publisher(self.trainer)
        if self.coupling.second_derivative and any(m.recompute != "none" for m in self.modules[1:]):
            rank_zero_warn(
                f"recompute={learner.recompute!r}: {type(self.coupling).__name__} differentiates "
                "local modules twice, which needs all their activations, so they are kept in these "
                "batches."
            )

    def resume(self, resumed: Resumed) -> None:
        """Goes on where a checkpoint was saved."""
        load_waiting_loaders(self.trainer)
        self.scalers.load(resumed.scalers)
        self.schedules.load(resumed.plateau)
        self.schedules.know(resumed.monitored)
        if resumed.mid_epoch and resumed.random is not None:
            # The iterator existed already, so nothing draws before the next batch.
            set_global_states(resumed.random)
        else:
            self._random = resumed.random

    def start_epoch(self) -> None:
        """Makes up for what a resumed run leaves out, or does once more."""
        self.schedules.catch_up()
        loop = self.trainer.fit_loop
        again = not loop.is_resuming and not loop.epoch_loop.restarting
        if self._random is not None and self.trainer.current_epoch > 0 and again:
            # Lightning asks the loader for an iterator a second time now.
            set_global_states(self._random)

    def check_losses(self) -> None:
        """Raises for a loss that was not finite, where no loss scaler skips such steps.

        With one module plain Lightning would go on, and the user may handle it in a hook.
        """
        with self.links.reasons():
            self.metrics.check(losses=self.num_modules > 1 and not self.scalers.scaling)

    def close(self) -> None:
        """Takes what the loop hung on the Trainer off it again."""
        self.schedules.close()
        self._saving.close()
        self._publisher.close()
        self.metrics.forget_step()
        self._expected = self._result = None
        self._compiled.close()

    def run(self, batch: Any, batch_idx: int) -> Any:
        """One batch through all local modules.

        Returns:
            What the user's `training_step` returned.
        """
        with ExitStack() as stack:
            stack.enter_context(self._compiled.running())
            if (meter := self.watch.meter) is not None:
                tensors = existing(self.learner, self.stepping.optimizers, batch)
                stack.enter_context(meter.running(tensors))
            return self._run(batch, batch_idx)

    def _run(self, batch: Any, batch_idx: int) -> Any:
        learner, several = self.learner, self.num_modules > 1
        with self.outside_precision():
            self.stepping.start(batch_idx)
        self._random, self.step_number = None, learner.batches
        if self.links.first:
            unpacked, target = learner.unpack(batch) if several else ((), None)
            inputs = as_inputs(unpacked)
            self._expected = Expected.of(inputs)
            given = inputs[0] if several and learner.method.loss.needs_input else None
            self.links.hide(inputs)
            self.links.send(0, Message(inputs, target, batch, batch_idx, given))
        self.run_modules()
        for module in self.modules if self._first else ():
            module.trained = True
        self._first = False
        self.stepping.end()
        self.metrics.close_step(learner.batches)
        learner.batches += 1
        self._log_window()
        result, self._result, self._expected = self._result, None, None
        return result

    @contextmanager
    def around(self, k: int) -> Iterator[None]:
        """Local module k's marks for profilers, random numbers and loss scaler."""
        streams = self.learner.streams
        with self.watch.profiled(k), streams.using(k, self.device), self.scalers.using(k):
            yield

    def around_finish(self, k: int) -> AbstractContextManager[Any]:
        """The meter, if somebody asked for one."""
        return self.watch.metered(k)

    def outside_precision(self) -> AbstractContextManager[Any]:
        """As automatic optimization runs backward and step."""
        return outside_precision(self.device, self._dtype)

    def forward(self, k: int, message: Message) -> tuple[Work, tuple[Any, ...], Any]:
        """As always, with a look at what a first batch tells."""
        work, sent, output = super().forward(k, message)
        if self._first:
            check_real(k, work.hidden, work.loss)
        if self._first and work.input is not None and work.loss is not None:
            check_graph(work.loss)
        return work, sent, output

    def local_loss(
        self, module: LocalModule, output: torch.Tensor, hidden: torch.Tensor, message: Message
    ) -> torch.Tensor:
        """The local loss, in the first batch looked at from all sides."""
        if self._first:
            k, default = self.modules.index(module), self.learner.default_criterion
            return first_loss(k, module, output, hidden, message, default)
        return super().local_loss(module, output, hidden, message)

    def last_loss(
        self, message: Message, run: Callable[[], Any] | None
    ) -> tuple[torch.Tensor | None, Any]:
        """The user's `training_step`, in which `run` stands for the network."""
        if run is None:
            with self._recomputing() as calls:
                loss = self._users_step(message)
            if self._first and calls == []:
                raise ValueError(
                    f"recompute={self.learner.recompute!r}, and training_step did not call the "
                    "network that is cut (or called parts of it directly), so nothing would be "
                    "computed twice: call the network, or leave recompute out."
                )
            with self.outside_precision():
                self.stepping.before_backward()
            return loss, None
        if self._expected is None:
            self._expected = Expected.of(as_inputs(self.learner.unpack(message.batch)[0]))
        network = Substitute(self.learner.network, run, self._expected, self._first)
        self.metrics.keep(message.target)
        with network.active():
            loss = self._users_step(message)
        if loss is not None and (self._first or message.batch_idx == 0):
            check_reach(loss, self.learner.module, self.learner.parameters_per_module()[0][-1])
        self.metrics.note_changed(network.changed)
        return loss, network.output if self.modules[-1].predicts else None

    @contextmanager
    def _recomputing(self) -> Iterator[list[int] | None]:
        """One module that recomputes takes the network's place in the user's step.

        Yields:
            A list that gets an entry for each call of the network; None without recomputing.
        """
        if not self.modules or self.modules[0].recompute == "none":
            yield None
            return
        network, module = self.learner.network, self.modules[0]
        forward, taken = network.forward, module.body.num_inputs

        def call(*args: Any, **kwargs: Any) -> Any:
            given = in_order(forward, args, kwargs)
            calls.append(len(given))
            if len(given) != taken:
                raise ValueError(
                    f"recompute={self.learner.recompute!r}: training_step calls the network with "
                    f"{len(given)} inputs, and it was traced with {taken}: pass "
                    "LocalLearner(unpack=...) that returns all of them."
                )
            return module(*given)

        calls: list[int] = []
        with replaced(network, "forward", call):
            yield calls

    def _users_step(self, message: Message) -> torch.Tensor | None:
        """Runs the user's `training_step` and keeps what it returned, as Lightning hands it on."""
        one, step = self.num_modules == 1, self.learner.module.training_step
        with no_stop(self.learner, "training_step"):
            loss, result = run_step(step, message.batch, message.batch_idx, may_skip=one)
        window = self.trainer.accumulate_grad_batches
        if loss is not None and window > 1:
            share = loss.detach() / window
            result = {**result, "loss": share} if isinstance(result, Mapping) else share
        self._result = result
        return loss

    def run_backward(self, loss: torch.Tensor, **options: Any) -> None:
        """Lightning's backward of a loss, of which an accumulation window takes its share."""
        if not loss.requires_grad and self.num_modules > 1:
            own, _ = self.learner.parameters_per_module()
            if not any(p.requires_grad for p in own[-1]):
                return  # the user's frozen classifier is the last local module: nothing to learn
        window = self.trainer.accumulate_grad_batches
        self.learner.manual_backward(loss if window == 1 else loss / window, **options)

    def scale(self, k: int) -> float | torch.Tensor:
        """1 / accumulated batches, times the loss scale."""
        return self.scalers.factor(k, self.device) / self.trainer.accumulate_grad_batches

    def note(self, k: int, loss: torch.Tensor, output: Any, target: Any) -> None:
        """Keeps it for the local metrics."""
        self.metrics.update(k, loss, output, target)

    def note_penalty(self, penalty: torch.Tensor | None) -> None:
        """The same."""
        self.metrics.add_penalty(penalty)

    def averages(self, k: int) -> bool:
        """Whether gradients of any local module here are on their way between replicas."""
        return bool(self._means)

    def start_average(self, k: int) -> None:
        """Starts to average the gradients over the replicas, after k's last backward."""
        average = self.links.average
        if not self.stepping.accumulates and (wait := average(k, self.stepping.parameters(k))):
            self._means[k] = wait

    def end_average(self, k: int) -> None:
        """Waits for the means."""
        if k in self._means:
            self._means.pop(k)()

    def step(self, k: int) -> None:
        """Steps the optimizer, unless gradients are accumulated."""
        self.stepping.step(k)

    def _log_window(self) -> None:
        """Logs and checks the window's means when Lightning's loggers are due."""
        if self.trainer._logger_connector.should_update_logs and not self.stepping.accumulates:
            self.check_losses()
            self._publish(epoch=False)

    def log_epoch(self) -> None:
        """Logs the epoch's means of the local metrics."""
        self.check_losses()
        self._publish(epoch=True)

    def _publish(self, epoch: bool) -> None:
        if self.num_modules > 1 and not self.trainer.barebones:
            self._publisher.publish(self.links.report(self.metrics.read(epoch)))
