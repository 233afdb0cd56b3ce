"""Decisions that glue takes while it is traced, on shapes and types but never on numbers.

Of `if x.shape[1] == 4:` torch.fx can't know the outcome. It is found on fake tensors, for the
example input; the branch that is taken there is traced, and generated code looks in every batch
whether the outcome is the same. So another form is an error, and never another result.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.fx.proxy import TraceError

__all__ = ["KINDS", "Decide", "Decisions", "Undecided", "failing_line", "same_as_traced"]

# Not bool(): the compiler keeps that symbolic, and torch 2.8 then can't compare it.
KINDS: dict[str, Callable[[Any], int]] = {"truth": lambda v: 1 if v else 0, "length": len}
# From the nodes so far, the last of which is asked about, and the mode, to its values in batches of
# different sizes; fails where numbers decide.
Decide = Callable[[Sequence[fx.Node], bool], Sequence[Any]]


class Undecided(TraceError):
    """A question without an answer yet; ends the trace, which starts again once it has one."""

    def __init__(self, node: fx.Node, kind: str) -> None:
        super().__init__("symbolically traced variables cannot be used as inputs to control flow")
        self.node, self.kind = node, kind


class Decisions:
    """The answers to what one network's glue asks, in the order of its questions."""

    def __init__(self) -> None:
        self._answers: list[int] = []
        self._asked = 0

    def restart(self) -> None:
        """The network is traced from its start again."""
        self._asked = 0

    def ask(self, proxy: fx.Proxy, kind: str) -> int:
        """The known answer, which generated code looks for again.

        Raises:
            Undecided: There is none yet.
        """
        if self._asked == len(self._answers):
            raise Undecided(proxy.node, kind)
        answer = self._answers[self._asked]
        self._asked += 1
        line = failing_line(traceback.extract_stack())
        proxy.tracer.create_proxy("call_function", same_as_traced, (proxy, kind, answer, line), {})
        return answer

    def settle(self, question: Undecided, decide: Decide, training: bool) -> None:
        """Finds the answer to the next question.

        Raises:
            Exception: There is none: numbers in a tensor decide, or the size of the batch does.
        """
        nodes = list(question.node.graph.nodes)
        values = decide(nodes[: nodes.index(question.node) + 1], training)
        (answer,) = {KINDS[question.kind](value) for value in values}
        self._answers.append(answer)


def same_as_traced(value: Any, kind: str, answer: int, line: str) -> None:
    """Stands in generated code where a decision was taken.

    Raises:
        ValueError: It would be another one now.
    """
    found = KINDS[kind](value)
    if found != answer:
        now, then = (bool(x) if kind == "truth" else x for x in (found, answer))
        raise ValueError(
            f"The network decides on the form of its input, and takes another way for this batch "
            f"than for the example it was cut with ({now} instead of {then}) at\n    {line}\n"
            "Give it batches of one form (drop_last=True, if it is the last one of an epoch), or "
            "move the code on that line into a submodule of its own."
        )


def failing_line(frames: Sequence[traceback.FrameSummary]) -> str:
    """The last line of the user's in a stack."""
    skipped = ("torch/fx/", "torch/nn/modules/module.py", "lightning_local/")
    own = [f for f in frames if not any(s in f.filename.replace("\\", "/") for s in skipped)]
    last = own[-1] if own else None
    return f"{last.filename}:{last.lineno}: {last.line}" if last else "line unknown"
