"""Second derivatives of convolutions and batch norms by the kernels of the first. Pure torch.

torch differentiates the backward of a convolution with a convolution whose channels are the batch
and whose kernel is the whole image, one per group, and the backward of a batch norm with some forty
passes over the activations. Here both come from the kernels of an ordinary training step. Nothing
changes but what the backward of the two puts into its own graph: forward, first gradients, autocast
and running statistics stay torch's.

Legend: y = f(x, w) in the forward, g = dl/dy, h = dl/dx = f'(g, x, w) in the first backward,
v = dJ/dh in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

__all__ = ["fast_second_derivatives", "graph_nodes"]

_aten = torch.ops.aten


class _Convolution(torch.autograd.Function):
    """h, linear in g and in w, for any convolution or transposed convolution."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, h: Sequence[Tensor], options: list[Any]) -> Tensor:
        """Takes h as the first backward made it, in a list that hides its graph."""
        ctx.save_for_backward(g, w)
        ctx.options = options
        return h[0].detach()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        """Since <v, h(g, w)> = <f(v, w), g>: f and its weight gradient, with v in place of x."""
        g, w = ctx.saved_tensors
        to_g = to_w = None
        if ctx.needs_input_grad[0]:
            to_g = _aten.convolution(v, w, None, *ctx.options)
        if ctx.needs_input_grad[1]:
            mask = [False, True, False]
            to_w = _aten.convolution_backward(g, v, w, None, *ctx.options, mask)[1]
        return to_g, to_w, None, None


class _BatchNorm(torch.autograd.Function):
    """h of a batch norm that uses the batch's statistics.

    With z = (x - mean) r the normalised input, r the inverse deviation, E the mean over all but
    channels and P(a) = a - E[a] - z E[az]: h = w r P(g).
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor | None, h: Sequence[Tensor], *statistics: Tensor
    ) -> Tensor:
        """Takes h as the first backward made it, in a list that hides its graph."""
        result = h[0].detach()
        ctx.save_for_backward(g, x, w, result, *statistics)
        return result

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        """P is symmetric, so v takes g's way; r and z, which depend on x, bring the rest."""
        if torch.is_grad_enabled():
            # torch's once_differentiable refuses only what passes its own node: not x's gradient.
            raise RuntimeError(
                "A third derivative of a batch norm is asked for, and second_order.py has none: "
                "leave out create_graph=True in the second backward."
            )
        g, x, w, h, mean, r = ctx.saved_tensors
        scale = torch.ones_like(r) if w is None else w.to(r.dtype)

        def sums(a: Tensor, b: Tensor, center: Tensor, factor: Tensor, mask: list[bool]) -> Any:
            """Three sums by one sweep: w r P(a), sum of a (b - center) factor, sum of a."""
            return _aten.native_batch_norm_backward(
                a, b, scale, None, None, center, factor, True, 0.0, mask
            )

        count = x.numel() / x.shape[1]
        to_g, vz, v_sum = sums(v, x, mean, r, [True, True, True])
        # What is masked has no name: a fake of it has bytes.
        gz, g_sum = sums(g, x, mean, r, [False, True, True])[1:]
        zero, one = torch.zeros_like(r), torch.ones_like(r)
        product = sums(v, g, zero, one, [False, True, False])[1]
        inner = product - (v_sum * g_sum + vz * gz) / count  # <P(v), g>
        to_x = None
        if ctx.needs_input_grad[1]:
            shape = [1, -1] + [1] * (x.dim() - 2)
            slope = -scale * inner * r**3 / count
            to_x = torch.addcmul((-slope * mean).view(shape), x, slope.view(shape))
            to_x.addcmul_(to_g, (-r * gz / count).view(shape))
            to_x.addcmul_(h, (-r * vz / count).view(shape))
            to_x = to_x.to(x.dtype)
        to_w = (r * inner).to(w.dtype) if w is not None and ctx.needs_input_grad[2] else None
        return to_g, to_x, to_w, None, None, None


class _Relu(torch.autograd.Function):
    """h = g where y > 0; torch's own also makes zeros for the gradient of y, and adds them."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor, h: Sequence[Tensor]) -> Tensor:
        """Takes h as the first backward made it, in a list that hides its graph."""
        ctx.save_for_backward(y)
        return h[0].detach()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        """The same mask."""
        return _aten.threshold_backward(v, ctx.saved_tensors[0], 0), None, None


def _convolution(node: Any, g: Tensor, h: Tensor) -> Tensor:
    options = [
        list(node._saved_stride),
        list(node._saved_padding),
        list(node._saved_dilation),
        node._saved_transposed,
        list(node._saved_output_padding),
        node._saved_groups,
    ]
    made: Tensor = _Convolution.apply(g, node._saved_weight, [h], options)
    return made


def _batch_norm(node: Any, g: Tensor, h: Tensor) -> Tensor:
    if not node._saved_training:
        return h
    statistics = node._saved_result1, node._saved_result2
    made: Tensor = _BatchNorm.apply(g, node._saved_input, node._saved_weight, [h], *statistics)
    return made


def _relu(node: Any, g: Tensor, h: Tensor) -> Tensor:
    made: Tensor = _Relu.apply(g, node._saved_result, [h])
    return made


_FAST: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "ConvolutionBackward0": _convolution,
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "ReluBackward0": _relu,
}


def graph_nodes(root: Node | None) -> Iterator[Node]:
    """All functions of the graph behind `root`, each once."""
    waiting, seen = [root], {root, None}
    while waiting:
        node = waiting.pop()
        if node is not None:
            yield node
            new = [following for following, _ in node.next_functions if following not in seen]
            seen.update(new)
            waiting += new


@contextmanager
def fast_second_derivatives(loss: Tensor) -> Iterator[None]:
    """A backward of `loss` inside the block, with `create_graph`, makes a graph of fast functions.

    Args:
        loss: Where the graph begins.

    Example:
        >>> weight = torch.ones(1, 1, 1, requires_grad=True)
        >>> x = torch.ones(1, 1, 2, requires_grad=True)
        >>> loss = torch.nn.functional.conv1d(x, weight).square().sum()
        >>> with fast_second_derivatives(loss):
        ...     gradient = torch.autograd.grad(loss, x, create_graph=True)[0]
        >>> gradient.grad_fn.name()
        '_ConvolutionBackward'
    """

    def replace(
        node: Node, made: tuple[Tensor | None, ...], received: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        h, g = made[0], received[0]
        if h is None or g is None or not h.requires_grad:
            return None
        try:
            return (_FAST[node.name()](node, g, h), *made[1:])
        except (AttributeError, CheckpointError):
            # Left to torch: a torch that keeps what the fast functions read under another name,
            # and a checkpointed segment, whose tensors can be read only once per backward.
            return None

    handles = [
        node.register_hook(partial(replace, node))
        for node in graph_nodes(loss.grad_fn)
        if node.name() in _FAST
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
