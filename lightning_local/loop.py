"""The one training loop of local learning. It serves one process and many.

For each local module k that lives here, in order (numbers are cited in the code):

    1 receive   the message of k-1: hidden state, target, batch, (boundary gradient)
    2 forward   body and head of k give l_k; the last one's l_k is the user's training_step
    3 prepare   what the coupling must know before the message can leave
    4 send      the detached hidden state to k+1
    5 backward  of l_k; its graph is freed (kept for one neighbour by a backward link)
    6 return    the boundary error to k-1, if the coupling has one
    7 link      k takes the error of k+1; a module of such a coupling steps one behind
    8 step      k's own optimizer; gradients are released

x_k is computed before k steps: neither the order of steps nor a module's place changes numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_local.compiling import Compiled
from lightning_local.couplings import Work
from lightning_local.first_batch import check_graph, first_loss
from lightning_local.message import Message
from lightning_local.meter import existing
from lightning_local.metrics import LocalMetrics
from lightning_local.precision import LossScalers, outside_precision
from lightning_local.publisher import Publisher
from lightning_local.randomness import set_global_states
from lightning_local.saving import SavingByStep
from lightning_local.schedules import Schedules
from lightning_local.state import Resumed
from lightning_local.stepping import Stepping
from lightning_local.substitute import Expected, Substitute
from lightning_local.watching import Watch
from lightning_local.wrapping import as_inputs, run_step

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["TrainingLoop"]


class TrainingLoop:
    """Runs batches through the local modules of one fit.

    Args:
        learner: Whose local modules; its `links` say where the neighbours are.
    """

    def __init__(self, learner: LocalLearner) -> None:
        self.learner = learner
        self.trainer = learner.trainer
        self.device = learner.device
        self.num_modules = learner.num_modules
        self.owned = learner.links.owned(self.num_modules)
        self.metrics = LocalMetrics(self.num_modules, self.device)
        self.scalers = LossScalers(self.trainer, self.num_modules)
        self._compiled = Compiled(learner)
        self.coupling = learner.method.coupling
        self.stepping = Stepping(learner, self.scalers, self.owned)
        self.watch = Watch(self.trainer, self.num_modules)
        self._modules = learner.modules_in_order()
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

    def resume(self, resumed: Resumed) -> None:
        """Goes on where a checkpoint was saved."""
        self.scalers.load(resumed.scalers)
        self.schedules.load(resumed.plateau)
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
        """Raises for a loss that was not finite, unless a loss scaler skips such steps."""
        with self.learner.links.reasons():
            self.metrics.check(losses=not self.scalers.scaling)

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
        learner = self.learner
        self.stepping.start(batch_idx)
        self._random = None
        if learner.links.first:
            unpacked, target = learner.unpack(batch) if self.num_modules > 1 else ((), None)
            inputs = as_inputs(unpacked)
            self._expected = Expected.of(inputs)
            given = inputs[0] if self.num_modules > 1 and learner.method.loss.needs_input else None
            learner.links.hide(inputs)
            learner.links.send(0, Message(inputs, target, batch, batch_idx, given))
        waiting: tuple[int, Work] | None = None
        for k in self.owned:
            work = self._start(k)
            if waiting is not None:
                self._finish(*waiting)
                waiting = None
            if (self.coupling.returns_error and k < self.num_modules - 1) or self._means:
                waiting = (k, work)
            else:
                self._finish(k, work)
        if waiting is not None:
            self._finish(*waiting)
        self._first = False
        self.stepping.end()
        self.metrics.close_step(learner.batches)
        learner.batches += 1
        self._log_window()
        result, self._result, self._expected = self._result, None, None
        return result

    def _start(self, k: int) -> Work:
        """Steps 1 to 6."""
        coupling, links = self.coupling, self.learner.links
        message = links.receive(k)  # 1
        with (
            self.watch.profiled(k),
            self.learner.streams.using(k, self.device),
            self.scalers.using(k),
        ):
            work, sent, output = self._forward(k, message)  # 2
            if work.loss is None:  # the user's step skips this batch
                self._average(k)
                return work
            loss = work.loss.detach()
            with outside_precision(self.device, self._dtype):
                gradient = coupling.prepare(work)  # 3
                if k < self.num_modules - 1:
                    onward = (message.target, message.batch, message.batch_idx, message.input)
                    links.send(k + 1, Message(sent, *onward, gradient))  # 4
                error = coupling.backward(work)  # 5
            if error is not None:
                links.return_error(k - 1, error)  # 6
            self.metrics.update(k, loss, output, message.target, work.penalty)
        if not coupling.returns_error:
            work.hidden = work.input = work.received = None
            self._average(k)
        return work

    def _forward(self, k: int, message: Message) -> tuple[Work, tuple[Any, ...], Any]:
        """Step 2: the local loss, what goes on to the next local module, and the prediction."""
        learner = self.learner
        last = k == self.num_modules - 1
        values, leaf = message.values, None
        module = self._modules[k] if self.num_modules > 1 else None
        leaves = self.coupling.wants_input(k, learner.batches)
        if leaves:
            leaf = values[0].detach().requires_grad_()
            values = (leaf, *values[1:])
        if module is not None and module.body.in_place and (k == 0 or leaf is not None):
            # What the body overwrites is the user's batch, or a leaf, which autograd forbids.
            values = (values[0].clone(), *values[1:])
        hidden, sent = None, ()
        with ExitStack() as stack:
            if self.coupling.second_derivative and leaves:
                # The fused attention kernels have no second derivative.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            loss: torch.Tensor | None
            if module is None:
                loss, output = self._users_step(message), None
                self.stepping.before_backward()
            elif last:
                if self._expected is None:
                    self._expected = Expected.of(as_inputs(learner.unpack(message.batch)[0]))
                network = Substitute(
                    learner.network, lambda: module(*values), self._expected, self._first
                )
                with network.active():
                    loss = self._users_step(message)
                output = network.output
                self.metrics.note_changed(network.changed)
            else:
                hidden, *carried = module(*values)
                if self.coupling.needs_input_gradient and not hidden.requires_grad:
                    hidden.requires_grad_()  # a frozen body; its head's gradient is still asked for
                output = module.predict(hidden)
                assert module.objective is not None
                if self._first:
                    loss = first_loss(module, output, hidden, message, learner.default_criterion)
                else:
                    loss = module.objective(output, hidden, message.target, message.input)
                if not module.predicts:
                    output = None
                sent = (hidden.detach(), *carried)
        if self._first and leaves and loss is not None:
            check_graph(loss)
        if isinstance(output, torch.Tensor):
            output = output.detach()
        work = Work(
            loss=loss,
            input=leaf,
            hidden=hidden,
            received=message.gradient,
            tail=module.body.tail if module is not None else lambda length: (),
            run_backward=self._backward,
            scale=self.scalers.factor(k, self.device) / self.trainer.accumulate_grad_batches,
            step=learner.batches,
        )
        return work, sent, output

    def _users_step(self, message: Message) -> torch.Tensor | None:
        """Runs the user's `training_step` and keeps what it returned, as Lightning hands it on."""
        loss, result = run_step(
            self.learner.module.training_step,
            message.batch,
            message.batch_idx,
            may_skip=self.num_modules == 1,
        )
        window = self.trainer.accumulate_grad_batches
        if loss is not None and window > 1:
            share = loss.detach() / window
            result = {**result, "loss": share} if isinstance(result, Mapping) else share
        self._result = result
        return loss

    def _backward(self, loss: torch.Tensor, **options: Any) -> None:
        if not loss.requires_grad and self.num_modules > 1:
            own, _ = self.learner.parameters_per_module()
            if not any(p.requires_grad for p in own[-1]):
                return  # the user's frozen classifier is the last local module: nothing to learn
        window = self.trainer.accumulate_grad_batches
        self.learner.manual_backward(loss if window == 1 else loss / window, **options)

    def _average(self, k: int) -> None:
        """Starts to average the gradients over the replicas, after k's last backward."""
        average = self.learner.links.average
        if not self.stepping.accumulates and (wait := average(k, self.stepping.parameters(k))):
            self._means[k] = wait

    def _finish(self, k: int, work: Work) -> None:
        """Steps 7 and 8."""
        with outside_precision(self.device, self._dtype), self.watch.metered(k):
            if self.coupling.returns_error:
                if k < self.num_modules - 1:
                    self.coupling.link(work, self.learner.links.await_error(k))  # 7
                self._average(k)
            if k in self._means:
                self._means.pop(k)()
            self.stepping.step(k)  # 8

    def _log_window(self) -> None:
        """Logs and checks the window's means when Lightning's loggers are due."""
        if not self.trainer._logger_connector.should_update_logs or self.stepping.accumulates:
            return
        self.check_losses()
        self._publish(epoch=False)

    def log_epoch(self) -> None:
        """Logs the epoch's means of the local metrics."""
        self.check_losses()
        self._publish(epoch=True)

    def _publish(self, epoch: bool) -> None:
        if self.num_modules > 1 and not self.trainer.barebones:
            self._publisher.publish(self.learner.links.report(self.metrics.read(epoch)))
