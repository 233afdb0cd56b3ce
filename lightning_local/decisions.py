"""Decisions that glue takes while it is traced, on shapes and types but never on numbers.

Of `if x.shape[1] == 4:` torch.fx can't know the outcome. It is found on fake tensors, for the
example input; the branch that is taken there is traced, and generated code looks in every batch
whether the outcome is the same. So another form is an error, and never another result.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["KINDS", "Decide", "Decisions", "Undecided", "failing_line", "same_as_traced"]


def _length(value: Any) -> int:
    """What a proxy's items are taken by; a dict or a set has none by number."""
    if not isinstance(value, (Sequence, torch.Tensor)):
        raise TypeError(f"a {type(value).__name__} is read item by item")
    return len(value)


# Not bool(): the compiler keeps that symbolic, and torch 2.8 then can't compare it.
KINDS: dict[str, Callable[[Any], int]] = {
    "truth": lambda v: 1 if v else 0,
    "length": _length,
    "none": lambda v: 1 if v is None else 0,
}
# From the nodes so far, the last of which is asked about, to the answer for it; whether that has to
# hold for other forms of the example too; fails where numbers decide, or the size of the batch.
Decide = Callable[[Sequence[fx.Node], Callable[[Any], int], bool], int]


class Undecided(BaseException):
    """A question without an answer yet; ends the trace, which starts again once it has one.

    Glue that catches any Exception doesn't catch it.
    """

    def __init__(self, node: fx.Node, kind: str) -> None:
        super().__init__("numbers in a tensor, or the size of the batch, decide what it does")
        self.node, self.kind = node, kind


class Decisions:
    """The answers to what one network's glue asks, in the order of its questions.

    Args:
        decide: Finds them.
    """

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
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
        # Ours, in `tracing.py`: it knows in whose forward the question stands.
        tracer: Any = proxy.tracer
        where = (failing_line(traceback.extract_stack()), tracer.stack[-1])
        tracer.create_proxy("call_function", same_as_traced, (proxy, kind, answer, *where), {})
        return answer

    def settle(self, question: Undecided, *, inside: bool) -> None:
        """Finds the answer to the next question.

        Args:
            question: Ended the trace.
            inside: It stands in a module that may be left whole, where the code may decide as it
                likes: the answer has to be the same for other forms too.

        Raises:
            Exception: There is none: numbers in a tensor decide, or the size of the batch does.
        """
        nodes = list(question.node.graph.nodes)
        nodes = nodes[: nodes.index(question.node) + 1]
        self._answers.append(self._decide(nodes, KINDS[question.kind], inside))


def same_as_traced(value: Any, kind: str, answer: int, line: str, path: str) -> None:
    """Stands in generated code where a decision was taken.

    Raises:
        ValueError: It would be another one now.
    """
    found = KINDS[kind](value)
    if found != answer:
        now, then = (x if kind == "length" else bool(x) for x in (found, answer))
        asked = f"whether it is None: {now}" if kind == "none" else str(now)
        whole = f", or keep `{path}` whole with Partition(leaves=[{path!r}])" if path else ""
        raise ValueError(
            f"The network decides on the form of its input, and takes another way for this batch "
            f"than for the example it was cut with ({asked} instead of {then}) at\n    {line}\n"
            "Give it batches of one form, precision and device (drop_last=True, if it is the last "
            "one of an epoch), or move the code on that line into a submodule of its own"
            f"{whole}."
        )


def failing_line(frames: Sequence[traceback.FrameSummary]) -> str:
    """The last line of the user's in a stack."""
    skipped = ("torch/fx/", "torch/nn/modules/module.py", "lightning_local/")
    own = [f for f in frames if not any(s in f.filename.replace("\\", "/") for s in skipped)]
    last = own[-1] if own else None
    return f"{last.filename}:{last.lineno}: {last.line}" if last else "line unknown"
