"""`compile=True`: the same numbers, without graph breaks, and eager again afterwards."""

import functools
import warnings

import pytest
import torch
from simple import METHODS, Lit, Net, run
from torch import nn
from torch._dynamo.utils import counters

from lightning_local import LocalLearner, loop, methods
from lightning_local.arguments import MODES
from lightning_local.compiling import CAPTURING, Compiled

# torch/_dynamo/variables/builder.py hides it with another showwarning, which comes after filters.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Still(nn.Module):
    """Without dropout, whose random numbers compiled code draws in another way."""

    def __init__(self, net=None):
        super().__init__()
        net = net or Net()
        self.stem, self.blocks, self.fc = net.stem, net.blocks, net.fc

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture
def quick(monkeypatch):
    """Captures and differentiates as ever, without generating C++; counts graphs and breaks."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def train(method, compile, quiet, **options):
    def make(module):
        return LocalLearner(module, METHODS[method](), compile=compile)

    with warnings.catch_warnings():
        if compile and method == "SGR":
            warnings.filterwarnings("ignore", message="compile=True: GradientReconciliation")
        return run(make, quiet, lambda: Lit(Still()), epochs=1, **options)[1]


# DGL and PredSim: what is compiled are a body and a head, as in the others.
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("DGL", "PredSim")])
def test_compiled_equals_eager_without_a_graph_break(method, quick, quiet):
    # Once with a smaller last batch: a second graph with a symbolic size, which takes its time.
    sizes = 2 if method == "BackLink" else 1
    options = {} if sizes == 2 else {"limit_train_batches": 2, "limit_val_batches": 2}
    eager = train(method, False, quiet, **options)
    assert counters["stats"]["unique_graphs"] == 0
    compiled = train(method, True, quiet, **options)
    # Bodies and heads; the network in one piece is compiled for evaluation too.
    graphs = {"EndToEnd": 2, "AugLocal": 5, "SGR": 2}
    assert counters["stats"]["unique_graphs"] == sizes * graphs.get(method, 7)
    assert sum(counters["graph_break"].values()) == 0
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(tensor, compiled.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert all(m._compiled_call_impl is None for m in compiled.modules())


def test_many_local_modules_are_all_compiled(quick, quiet):
    """The compiler's limit of 8 variants per code object holds for each of them by itself."""

    def make(module):
        return LocalLearner(module, "Greedy", compile=True)

    _, learner = run(make, quiet, lambda: Lit(Still(Net(blocks=11))), epochs=1, max_steps=1)
    assert learner.num_modules == 12
    assert counters["stats"]["unique_graphs"] == 23
    assert not counters["recompile_limit"]


def test_what_is_differentiated_twice_stays_eager_and_says_so_once(quick, quiet):
    with pytest.warns(UserWarning, match="local modules 1 to 3 twice, .* so they stay eager") as w:
        run(lambda m: LocalLearner(m, "SGR", compile=True), quiet, lambda: Lit(Still()))
    assert sum("stay eager" in str(each.message) for each in w) == 1


@pytest.mark.parametrize("method", ["BackLink"])
def test_with_generated_code(method, quiet):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(36, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x.flatten(1))))

    torch._dynamo.reset()
    found = []
    for compile in (False, True):
        method = methods.BackLink(head=methods.Greedy().head)
        make = functools.partial(LocalLearner, method=method, compile=compile)
        options = {"limit_train_batches": 2, "limit_val_batches": 0}
        found.append(run(make, quiet, lambda: Lit(Small()), epochs=1, **options)[1].state_dict())
    torch._dynamo.reset()
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-6)


def test_the_modes_are_the_compilers_own():
    assert set(MODES) <= set(torch._inductor.list_mode_options())
    captures = [
        m for m, o in torch._inductor.list_mode_options().items() if "triton.cudagraphs" in o
    ]
    assert sorted(captures) == sorted(CAPTURING)


@pytest.fixture
def modes(monkeypatch):
    """The mode of each call of the compiler, which is not run."""
    called = []
    monkeypatch.setattr(torch, "compile", lambda f, mode: called.append(mode) or f)
    return called


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ("reduce-overhead", "default"),
        ("max-autotune", "max-autotune-no-cudagraphs"),
    ],
)
def test_without_cuda_nothing_is_captured_and_a_warning_says_so(asked, taken, modes, quiet):
    with pytest.warns(UserWarning, match=f"'cpu': compiled with the mode '{taken}' instead"):
        run(lambda m: LocalLearner(m, "Greedy", compile=asked), quiet, max_steps=1)
    assert modes == [taken] * 7


@pytest.mark.parametrize("asked", [True, "default", "max-autotune-no-cudagraphs"])
def test_other_modes_are_passed_on(asked, modes, quiet):
    run(lambda m: LocalLearner(m, "Greedy", compile=asked), quiet, max_steps=1)
    assert modes == ["default" if asked is True else asked] * 7


@pytest.fixture
def on_cuda(modes, monkeypatch):
    """The learner says that it is on a GPU when it is asked how to compile; it is on the CPU."""

    def compiled(learner):
        with monkeypatch.context() as patch:
            patch.setattr(LocalLearner, "device", torch.device("cuda"))
            return Compiled(learner)

    monkeypatch.setattr(loop, "Compiled", compiled)


def test_capturing_marks_each_step_once(on_cuda, modes, quiet, monkeypatch):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    trainer, _ = run(
        lambda m: LocalLearner(m, "BackLink", compile="reduce-overhead"), quiet, epochs=2
    )
    assert modes == ["reduce-overhead"] * 7
    assert len(marks) == trainer.global_step > 1


def test_captured_gradients_may_not_accumulate(on_cuda, quiet):
    with pytest.raises(ValueError, match="can't accumulate: pass accumulate_grad_batches=1"):
        run(
            lambda m: LocalLearner(m, "Greedy", compile="reduce-overhead"),
            quiet,
            accumulate_grad_batches=2,
        )


class Placeholders:
    """What a compiled function takes: names of tensors, and whether their address stays."""

    def __init__(self):
        self.moving = []

    def __call__(self, graph, inputs):
        for node in graph.graph.find_nodes(op="placeholder"):
            kind = node.meta["tensor_dict"].get("_dynamo_static_input_type")
            if kind is None:
                self.moving.append(node.name)
        return graph.forward


def test_weights_and_buffers_stay_where_they_are(monkeypatch, quiet):
    """Else each replay of a captured graph would copy them."""
    torch._dynamo.reset()
    seen = Placeholders()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=seen))
    run(
        lambda m: LocalLearner(m, "Greedy", compile=True),
        quiet,
        lambda: Lit(Still()),
        max_steps=1,
        limit_val_batches=0,
    )
    torch._dynamo.reset()
    # Of each of 4 bodies and 3 heads, only the input.
    assert len(seen.moving) == 7, seen.moving


def test_a_compiled_learner_is_refused(quick, quiet):
    with pytest.raises(ValueError, match=r"pass LocalLearner\(compile=True\)"):
        run(lambda m: torch.compile(LocalLearner(m, "Greedy")), quiet)
