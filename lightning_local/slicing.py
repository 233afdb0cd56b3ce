"""From split points to bodies: where each cut lies, who owns which tensor, the code in between."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from lightning_local.body import Body, crossing, slice_code
from lightning_local.traced import Trace
from lightning_local.units import cut_places

__all__ = ["place", "slices"]


def _feeders(traced: Trace, i: int) -> list[str]:
    """Names of the modules whose results are alive after node `i`."""
    names = []
    for node in traced.alive(i):
        source: fx.Node | None = node
        while source is not None and source.op not in ("call_module", "placeholder"):
            inputs = [n for n in source.all_input_nodes if traced.depends_on_parameters(n)]
            source = inputs[-1] if inputs else None
        if traced.depends_on_parameters(node):
            names.append(str(source.target) if source is not None else node.name)
    return names


def place(network: nn.Module, traced: Trace, point: str) -> int:
    """Where the cut after `point` lies.

    Raises:
        ValueError: It can't be cut there.
    """
    count = traced.call_counts.get(point, 0)
    if count != 1:
        raise ValueError(
            f"Split point `{point}` is called {count} times in the forward of "
            f"{type(network).__name__}, so it names no single place: pass the name of a submodule "
            "that is called once."
        )
    found = cut_places(traced)[point]
    if found is None:
        stop = next(call.stop for call in traced.calls if call.path == point)
        if stop >= len(traced.nodes) - 1:
            raise ValueError(
                f"Nothing follows split point `{point}`, the end of the network: leave it out."
            )
        if not any(traced.depends_on_parameters(n) for n in traced.nodes[:stop]):
            raise ValueError(
                f"Nothing before the cut after `{point}` has parameters, so there is nothing to "
                "train there: cut later."
            )
        feeders = ", ".join(f"`{name}`" for name in _feeders(traced, stop - 1))
        raise ValueError(
            f"The network can't be cut after `{point}`: more than one tensor would cross (results "
            f"of {feeders}). Cut before the paths part or after they join."
        )
    if not any(
        n.op == "get_attr"
        and traced.depends_on_parameters(n)
        or n.op == "call_module"
        and traced.has_parameters(n)
        for n in traced.nodes[found + 1 :]
    ):
        raise ValueError(
            f"Nothing with parameters follows split point `{point}`, the end of the network: leave "
            "it out."
        )
    return found


def _owners(
    network: nn.Module, used: Sequence[Sequence[str]], exclusive: bool
) -> tuple[list[list[str]], list[list[str]]]:
    """Gives each parameter and buffer to one body; what no body uses belongs to the last one."""
    first: dict[int, tuple[int, str]] = {}
    parameters: list[list[str]] = [[] for _ in used]
    buffers: list[list[str]] = [[] for _ in used]
    named_parameters = dict(network.named_parameters(remove_duplicate=False))
    named_buffers = dict(network.named_buffers(remove_duplicate=False))
    for k, names in enumerate(used):
        for name in names:
            for path, parameter in named_parameters.items():
                if path != name and not path.startswith(name + "."):
                    continue
                owner, other = first.setdefault(id(parameter), (k, path))
                if owner != k and exclusive:
                    raise ValueError(
                        f"Parameter `{path}` is used on both sides of a cut (as `{other}` in local "
                        f"module {owner}, as `{path}` in {k}), and each local module has its own "
                        "optimizer. Untie it, or choose split points that keep its uses together."
                    )
                if other == path or owner != k:
                    parameters[k].append(path)
            for path, buffer in named_buffers.items():
                if path == name or path.startswith(name + "."):
                    owner, _ = first.setdefault(id(buffer), (k, path))
                    if owner == k and path not in buffers[k]:
                        buffers[k].append(path)
    for named, lists in ((named_parameters, parameters), (named_buffers, buffers)):
        taken = {path for names in lists for path in names}
        lists[-1].extend(
            path for path, tensor in named.items() if path not in taken and id(tensor) not in first
        )
    return parameters, buffers


def slices(
    network: nn.Module,
    traces: dict[bool, Trace],
    points: Sequence[str],
    unit_points: Sequence[str],
    exclusive: bool = True,
) -> tuple[Body, ...]:
    """The network's bodies between `points`, each with its units' parameters."""
    ends = {
        mode: [-1, *(place(network, t, p) for p in points), len(t.nodes) - 1]
        for mode, t in traces.items()
    }
    codes, used, forms = [], [], []
    for k in range(len(points) + 1):
        pair = [slice_code(t, *ends[mode][k : k + 2]) for mode, t in traces.items()]
        codes.append([code for code, _, _ in pair])
        used.append(list(dict.fromkeys(name for _, names, _ in pair for name in names)))
        forms.append(tuple(dict.fromkeys(name for _, _, names in pair for name in names)))
    parameters, buffers = _owners(network, used, exclusive)
    unit_ends = [place(network, traces[True], p) for p in unit_points]
    bodies = []
    for k, (train, evaluation) in enumerate(codes):
        start, stop = ends[True][k : k + 2]
        cuts = [start, *(u for u in unit_ends if start < u < stop), stop]
        units = [slice_code(traces[True], a, b)[1] for a, b in _pairs(cuts)]
        opened = _modal_scopes(traces, {m: ends[m][k : k + 2] for m in traces})
        body = Body(network, train, evaluation, parameters[k], buffers[k], used[k], opened, units)
        inputs = sum(node.op == "placeholder" for node in traces[True].nodes)
        body.num_inputs = len(traces[True].alive(start)) if start >= 0 else inputs
        body.num_carried = len(traces[True].alive(start)) - 1 if start >= 0 else 0
        body.views = _views(traces[True], start, stop)
        body.forms = forms[k]
        if start < 0:
            body.plain = {mode: t.plain for mode, t in traces.items()}
        bodies.append(body)
    return tuple(bodies)


def _modal_scopes(traces: dict[bool, Trace], ends: dict[bool, list[int]]) -> list[str]:
    """Modules whose own glue in this slice differs between train and eval mode."""
    glue: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for mode, traced in traces.items():
        start, stop = ends[mode]
        for node in traced.nodes[start + 1 : stop + 1]:
            form = f"{node.op} {node.target} {node.args} {node.kwargs}"
            glue[mode].setdefault(traced.scopes[node], []).append(form)
    return [s for s in {**glue[True], **glue[False]} if glue[True].get(s) != glue[False].get(s)]


def _views(traced: Trace, start: int, stop: int) -> tuple[int, ...]:
    """Which of the values that ride on from a slice are views of its parameters."""
    if stop == len(traced.nodes) - 1:
        return ()
    made = set(traced.nodes[start + 1 : stop + 1])
    return tuple(i for i, n in enumerate(crossing(traced, stop)[1:]) if n in traced.views & made)


def _pairs(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(ends[:-1], ends[1:], strict=True))
