"""One batch through local modules, the one loop of local learning. It serves one process and many.

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
What is of a fit (the Trainer's precision, logging, optimizers) is added by `loop.py`;
`rehearsal.py` runs the same steps on fake tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from lightning_local.couplings import Coupling, Work
from lightning_local.links import Links
from lightning_local.local_module import LocalModule
from lightning_local.message import Message

__all__ = ["BatchLoop"]


def _apart(hidden: torch.Tensor) -> torch.Tensor:
    """The hidden state without its graph; a copy of a view of a weight, which k is going to step.

    Learned queries are such a view.
    """
    base = hidden._base if hidden._is_view() else hidden
    return hidden.detach().clone() if isinstance(base, nn.Parameter) else hidden.detach()


class BatchLoop(ABC):
    """Runs batches through the local modules that live here.

    Args:
        modules: All K local modules; empty for a network that is trained end to end.
        coupling: What neighbours tell each other.
        links: Where the neighbours are.

    Attributes:
        num_modules: K, 1 for a network that is trained end to end.
        owned: Indices of the local modules that live here.
        step_number: Number of the batch since the start of training.
    """

    def __init__(self, modules: Sequence[LocalModule], coupling: Coupling, links: Links) -> None:
        self.modules, self.coupling, self.links = modules, coupling, links
        self.num_modules = max(1, len(modules))
        self.owned = links.owned(self.num_modules)
        self.step_number = 0

    def run_modules(self) -> None:
        """Steps 1 to 8 of every local module, once the first one's message is sent."""
        waiting: tuple[int, Work] | None = None
        for k in self.owned:
            work = self._start(k)
            if waiting is not None:
                self._finish(*waiting)
                waiting = None
            if (self.coupling.returns_error and k < self.num_modules - 1) or self.averages(k):
                waiting = (k, work)
            else:
                self._finish(k, work)
        if waiting is not None:
            self._finish(*waiting)

    def _start(self, k: int) -> Work:
        """Steps 1 to 6."""
        message = self.links.receive(k)  # 1
        with self.around(k):
            work, sent, output = self.forward(k, message)  # 2
            if work.loss is None:  # the user's step skips this batch
                self.start_average(k)
                return work
            self.note(k, work.loss.detach(), output, message.target)
            onward = (message.target, message.batch, message.batch_idx, message.input)
            # From here on the graph alone holds the input, and frees it as early as it can; the
            # logits of a language model are its largest tensor.
            del message, output
            with self.outside_precision():
                gradient = self.coupling.prepare(work)  # 3
                if k < self.num_modules - 1:
                    self.links.send(k + 1, Message(sent, *onward, gradient))  # 4
                error = self.coupling.backward(work)  # 5
            if error is not None:
                self.links.return_error(k - 1, error)  # 6
            self.note_penalty(work.penalty)
        if not self.coupling.returns_error:
            work.hidden = work.input = work.received = None
            self.start_average(k)
        return work

    def forward(self, k: int, message: Message) -> tuple[Work, tuple[Any, ...], Any]:
        """Step 2: the local loss, what goes on to the next local module, and the prediction."""
        last = k == self.num_modules - 1
        values, leaf = message.values, None
        module = self.modules[k] if self.num_modules > 1 else None
        leaves = self.coupling.wants_input(k, self.step_number)
        if leaves:
            leaf = values[0].detach().requires_grad_()
            values = (leaf, *values[1:])
        if module is not None:
            module.keeps = leaves and self.coupling.second_derivative
        if module is not None and module.body.in_place and (k == 0 or leaf is not None):
            # What the body overwrites is the user's batch, or a leaf, which autograd forbids.
            values = (values[0].clone(), *values[1:])
        hidden, sent = None, ()
        with ExitStack() as stack:
            if self.coupling.second_derivative and leaves:
                # The fused attention kernels have no second derivative.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            loss: torch.Tensor | None
            if module is None or last:
                run = None if module is None else lambda: module(*values)
                loss, output = self.last_loss(message, run)
            else:
                hidden, *carried = module(*values)
                if self.coupling.needs_input_gradient and not hidden.requires_grad:
                    hidden.requires_grad_()  # a frozen body; its head's gradient is still asked for
                output = module.predict(hidden)
                loss = self.local_loss(module, output, hidden, message)
                if not module.predicts:
                    output = None
                for i in module.body.views:  # the step changes the weights before others read them
                    carried[i] = tree_map_only(torch.Tensor, torch.clone, carried[i])
                sent = (_apart(hidden), *carried)
        if isinstance(output, torch.Tensor):
            output = output.detach()
        work = Work(
            loss=loss,
            input=leaf,
            hidden=hidden,
            received=message.gradient,
            tail=module.body.tail if module is not None else lambda length: (),
            run_backward=self.run_backward,
            scale=self.scale(k),
            step=self.step_number,
        )
        return work, sent, output

    def _finish(self, k: int, work: Work) -> None:
        """Steps 7 and 8."""
        with self.outside_precision(), self.around_finish(k):
            if self.coupling.returns_error:
                if k < self.num_modules - 1:
                    self.coupling.link(work, self.links.await_error(k))  # 7
                self.start_average(k)
            self.end_average(k)
            self.step(k)  # 8

    @abstractmethod
    def last_loss(
        self, message: Message, run: Callable[[], Any] | None
    ) -> tuple[torch.Tensor | None, Any]:
        """The loss of the last local module, and the network's output.

        Args:
            message: Its message.
            run: Makes the network's output; None with one module, which is the network itself.

        Returns:
            The loss is None for a batch that is skipped, the output where it is not known.
        """

    def local_loss(
        self, module: LocalModule, output: torch.Tensor, hidden: torch.Tensor, message: Message
    ) -> torch.Tensor:
        """The loss of a local module with a head."""
        assert module.objective is not None
        loss: torch.Tensor = module.objective(output, hidden, message.target, message.input)
        return loss

    @abstractmethod
    def run_backward(self, loss: torch.Tensor, **options: Any) -> None:
        """The backward of a loss."""

    @abstractmethod
    def step(self, k: int) -> None:
        """Steps the optimizer of local module k and releases gradients."""

    def scale(self, k: int) -> float | torch.Tensor:
        """Factor on l_k in `.grad`."""
        return 1.0

    def note(self, k: int, loss: torch.Tensor, output: Any, target: Any) -> None:
        """Takes down the loss and the prediction of local module k."""
        return

    def note_penalty(self, penalty: torch.Tensor | None) -> None:
        """Takes down what the coupling added to that loss."""
        return

    def around(self, k: int) -> AbstractContextManager[Any]:
        """Around steps 2 to 6 of local module k."""
        return nullcontext()

    def around_finish(self, k: int) -> AbstractContextManager[Any]:
        """Around steps 7 and 8 of local module k."""
        return nullcontext()

    def outside_precision(self) -> AbstractContextManager[Any]:
        """Around what runs without a step's precision: backward and step."""
        return nullcontext()

    def averages(self, k: int) -> bool:
        """Whether gradients of local module k are on their way between replicas."""
        return False

    def start_average(self, k: int) -> None:
        """Starts to average the gradients over the replicas, after k's last backward."""
        return

    def end_average(self, k: int) -> None:
        """Waits for the means."""
        return
