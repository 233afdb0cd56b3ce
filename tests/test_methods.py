"""Every method and every combination: three steps inside a Trainer equal `reference.py`.

Compared in float64 to 1e-10: losses, what is back-propagated, gradients by name, and all weights
and buffers of network and heads after the fit, momentum and weight decay included. The reference
keeps all graphs and steps once at the end of the batch, so the comparison also shows that stepping
each module at once changes nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
from networks import Cnn, Mlp, PreAct, ResNet, Tagger, Vit
from reference import Coupling
from reference_losses import InfoPro, PredSim
from twin import DENORMALIZE, Case, check_three_steps

from lightning_local import Partition, couplings, heads, methods
from lightning_local.methods import LocalMethod

Link, Reconcile = couplings.BackwardLink, couplings.GradientReconciliation
SGR_WEIGHT = 0.05


def link(**options: Any) -> Coupling:
    return Coupling("backlink", **options)


def sgr(**options: Any) -> Coupling:
    return Coupling("sgr", **{"weight": SGR_WEIGHT, **options})


def sgr_method(**options: Any) -> LocalMethod:
    return methods.SGR(**{"weight": SGR_WEIGHT, **options})


def predsim(name: str, network: Any, sizes: list[int], partition: Any = "units", **o: Any) -> Case:
    loss = PredSim(o.get("beta", 0.99), o.get("parts", "predsim"))
    method = methods.PredSim(**{"pool_features": 32, **o})
    return Case(f"predsim-{name}", network, method, sizes, partition=partition, loss=loss)


def infopro(name: str, network: Any, sizes: list[int], partition: Any = "units", **o: Any) -> Case:
    denormalize = DENORMALIZE[network]
    lams = {key: o[key] for key in ("lam_first", "lam_last") if key in o}
    loss = InfoPro(*denormalize, o.get("task") == "contrast", **lams)
    method = methods.InfoPro(denormalize=denormalize, **o)
    return Case(f"infopro-{name}", network, method, sizes, partition=partition, loss=loss)


def augmented(**options: Any) -> LocalMethod:
    return LocalMethod(heads.Augmented(1), coupling=options.pop("coupling", None))


CASES = [
    # greedy
    Case("greedy-cnn", Cnn, methods.Greedy(), [1] * 5),
    Case("greedy-cnn-2", Cnn, methods.Greedy(), [3, 2], partition=2),
    Case("greedy-cnn-3", Cnn, methods.Greedy(), [2, 2, 1], partition=3),
    Case("greedy-cnn-points", Cnn, methods.Greedy(), [1, 3, 1], partition=["blocks.0", "blocks.3"]),
    Case(
        "greedy-cnn-partition",
        Cnn,
        methods.Greedy(),
        [4, 1],
        partition=Partition(split_points=["blocks.3"]),
    ),
    Case("greedy-resnet", ResNet, methods.Greedy(), [1] * 5),
    Case("greedy-preact", PreAct, methods.Greedy(), [1] * 4),
    Case("greedy-mlp", Mlp, methods.Greedy(), [1] * 4),
    Case("greedy-vit", Vit, methods.Greedy(), [1] * 4),
    Case("greedy-tagger", Tagger, methods.Greedy(), [1] * 4),
    Case("conv-cnn", Cnn, methods.Greedy(head=heads.Conv()), [1] * 5),
    Case("conv-vit", Vit, methods.Greedy(head=heads.Conv(16)), [1] * 4),
    # AugLocal: the last depth + 1 units are one module, before the cuts are made
    Case("auglocal-resnet", ResNet, methods.AugLocal(depth=2), [1, 1, 3]),
    Case("auglocal-resnet-1", ResNet, methods.AugLocal(depth=1), [1, 1, 1, 2]),
    Case("auglocal-resnet-0", ResNet, methods.AugLocal(depth=0, pyramid=0), [1] * 5),
    Case("auglocal-resnet-3-of-5", ResNet, methods.AugLocal(depth=1), [2, 3], partition=3),
    Case(
        "auglocal-points",
        ResNet,
        methods.AugLocal(depth=2),
        [2, 2, 1],
        partition=["layer1.0", "layer2.0"],
    ),
    Case("auglocal-copy-resnet", ResNet, methods.AugLocal(depth=2, block="copy"), [1, 1, 3]),
    Case("auglocal-init-resnet", ResNet, methods.AugLocal(depth=2, init="copy"), [1, 1, 3]),
    Case("auglocal-cnn", Cnn, methods.AugLocal(depth=2), [1, 1, 3]),
    Case("auglocal-preact", PreAct, methods.AugLocal(depth=1), [1, 1, 2]),
    Case("auglocal-mlp", Mlp, methods.AugLocal(depth=1), [1, 1, 2]),
    Case("auglocal-vit", Vit, methods.AugLocal(depth=1), [1, 1, 2]),
    Case("auglocal-tagger", Tagger, methods.AugLocal(depth=1), [1, 1, 2]),
    # BackLink
    Case("backlink-cnn", Cnn, methods.BackLink(), [1] * 5, link()),
    Case("backlink-cnn-2", Cnn, methods.BackLink(weight=0.3), [3, 2], link(weight=0.3), 2),
    Case(
        "backlink-cnn-3-tail",
        Cnn,
        methods.BackLink(weight=2.0, length=1),
        [2, 2, 1],
        link(weight=2.0, length=1),
        3,
    ),
    Case(
        "backlink-points-tail",
        Cnn,
        methods.BackLink(length=2),
        [3, 1, 1],
        link(length=2),
        ["blocks.2", "blocks.3"],
    ),
    Case("backlink-resnet", ResNet, methods.BackLink(), [2, 2, 1], link(), 3),
    Case("backlink-preact", PreAct, methods.BackLink(), [1] * 4, link()),
    Case("backlink-preact-tail", PreAct, methods.BackLink(length=1), [2, 2], link(length=1), 2),
    Case("backlink-mlp", Mlp, methods.BackLink(weight=0.5), [1] * 4, link(weight=0.5)),
    Case("backlink-vit", Vit, methods.BackLink(), [2, 2], link(), 2),
    Case("backlink-tagger", Tagger, methods.BackLink(), [1] * 4, link()),
    # SGR
    *(
        Case(
            f"sgr-cnn-{name}",
            Cnn,
            sgr_method(distance=name),
            [2, 2, 1],
            sgr(distance=name),
            3,
        )
        for name in ("squared_l2", "mse", "cosine", "normalized_l2")
    ),
    Case("sgr-units", Cnn, sgr_method(), [1] * 5, sgr()),
    Case("sgr-every", Cnn, sgr_method(every=2), [3, 2], sgr(every=2), 2),
    Case("sgr-warmup", Cnn, sgr_method(warmup=2), [3, 2], sgr(warmup=2), 2),
    Case("sgr-warmup-5", Cnn, sgr_method(warmup=5), [3, 2], sgr(warmup=5), 2),
    Case("sgr-resnet", ResNet, sgr_method(), [2, 2, 1], sgr(), 3),
    Case("sgr-preact", PreAct, sgr_method(), [1] * 4, sgr()),
    Case("sgr-mlp", Mlp, sgr_method(), [1] * 4, sgr()),
    Case("sgr-vit", Vit, sgr_method(), [1] * 4, sgr()),
    Case("sgr-tagger", Tagger, sgr_method(distance="cosine"), [2, 2], sgr(distance="cosine"), 2),
    # combinations that no paper has
    Case("augmented-link", ResNet, augmented(coupling=Link(0.7)), [1, 1, 1, 2], link(weight=0.7)),
    Case("auglocal-link-cnn", Cnn, methods.AugLocal(depth=2, coupling=Link()), [1, 1, 3], link()),
    Case(
        "auglocal-link-preact",
        PreAct,
        methods.AugLocal(depth=1, coupling=Link()),
        [1, 1, 2],
        link(),
    ),
    Case("augmented-sgr", ResNet, augmented(coupling=Reconcile(SGR_WEIGHT)), [1, 1, 1, 2], sgr()),
    Case(
        "auglocal-sgr-vit",
        Vit,
        methods.AugLocal(depth=1, coupling=Reconcile(SGR_WEIGHT, "cosine")),
        [1, 1, 2],
        sgr(distance="cosine"),
    ),
    Case("linear-link", Cnn, methods.Greedy(coupling=Link(length=1)), [3, 2], link(length=1), 2),
    Case("linear-sgr", Cnn, methods.Greedy(coupling=Reconcile(SGR_WEIGHT)), [2, 2, 1], sgr(), 3),
    Case("linear-link-mlp", Mlp, methods.BackLink(head=heads.Linear()), [2, 2], link(), 2),
    Case("linear-sgr-mlp", Mlp, sgr_method(head=heads.Linear()), [2, 2], sgr(), 2),
    # a head that begins by overwriting the hidden state, which the next body needs as it was
    *(
        Case(
            f"overwriting-head-{how.kind}",
            PreAct,
            methods.AugLocal(depth=1, coupling=coupling),
            [3, 1],
            how,
            ["blocks.2"],
        )
        for coupling, how in (
            (couplings.Isolated(), Coupling()),
            (Link(), link()),
            (Reconcile(SGR_WEIGHT), sgr()),
        )
    ),
    # frozen units: one, or all of a module
    *(
        Case(f"frozen-{name}-{'-'.join(map(str, units))}", Cnn, method, [2, 2, 1], how, 3, units)
        for name, method, how in (
            ("greedy", methods.Greedy(), Coupling()),
            ("backlink", methods.BackLink(), link()),
            ("tail", methods.BackLink(length=1), link(length=1)),
            ("sgr", sgr_method(), sgr()),
        )
        for units in ((0,), (0, 1), (2, 3))
    ),
    # DGL
    Case("dgl-cnn", Cnn, methods.DGL(), [1] * 5),
    Case("dgl-cnn-2", Cnn, methods.DGL(), [3, 2], partition=2),
    Case("dgl-resnet", ResNet, methods.DGL(), [1] * 5),
    Case("dgl-preact", PreAct, methods.DGL(variant="original"), [1] * 4),
    Case("dgl-no-convs", ResNet, methods.DGL(convs=0), [2, 2, 1], partition=3),
    Case("dgl-linear", ResNet, methods.DGL(convs=1, hidden=0), [2, 2, 1], partition=3),
    Case("dgl-mlp", Mlp, methods.DGL(), [1] * 4),
    Case("dgl-vit", Vit, methods.DGL(variant="original"), [1] * 4),
    Case("dgl-tagger", Tagger, methods.DGL(), [1] * 4),
    # PredSim
    predsim("cnn", Cnn, [1] * 5),
    predsim("cnn-2", Cnn, [3, 2], 2),
    predsim("resnet", ResNet, [1] * 5),
    predsim("preact", PreAct, [1] * 4),
    predsim("mlp", Mlp, [1] * 4),
    predsim("vit", Vit, [1] * 4),
    predsim("tagger", Tagger, [1] * 4),
    predsim("unpooled", Cnn, [2, 2, 1], 3, pool_features=512),
    predsim("zero-init", Cnn, [2, 2, 1], 3, zero_init=True, beta=0.5),
    *(
        predsim(f"{parts}-{network.__name__.lower()}", network, sizes, parts=parts)
        for parts in ("pred", "sim")
        for network, sizes in ((Cnn, [1] * 5), (Mlp, [1] * 4), (Tagger, [1] * 4))
    ),
    predsim("beta-0", Cnn, [2, 2, 1], 3, beta=0.0),
    predsim("beta-1", Cnn, [2, 2, 1], 3, beta=1.0),
    # InfoPro
    *(
        infopro(f"{task}-{network.__name__.lower()}", network, sizes, task=task)
        for task in ("softmax", "contrast")
        for network, sizes in (
            (Cnn, [1] * 5),
            (ResNet, [1] * 5),
            (PreAct, [1] * 4),
            (Mlp, [1] * 4),
            (Vit, [1] * 4),
            (Tagger, [1] * 4),
        )
    ),
    infopro("2", Cnn, [3, 2], 2, lam_last=(0.0, 0.0)),
    infopro("3", Cnn, [2, 2, 1], 3, lam_first=(1.0, 2.0), lam_last=(3.0, 0.1)),
    infopro("no-task-first", Cnn, [2, 2, 1], 3, lam_first=(5.0, 0.0)),
    infopro("no-image-last", ResNet, [2, 2, 1], 3, lam_last=(0.0, 1.0), task="contrast"),
    infopro("widen", Cnn, [2, 2, 1], 3, widen=2.0),
    infopro("head", ResNet, [2, 2, 1], 3, head=heads.Linear()),
    # frozen units behind and in front of a projection and a decoder
    *(
        Case(
            f"frozen-{kind}-{'-'.join(map(str, units))}",
            Cnn,
            case.method,
            [2, 2, 1],
            partition=3,
            loss=case.loss,
            frozen=units,
        )
        for kind, case in (("predsim", predsim("", Cnn, [])), ("infopro", infopro("", Cnn, [])))
        for units in ((0, 1), (2, 3))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_three_steps_equal_the_reference(case: Case) -> None:
    check_three_steps(case)
