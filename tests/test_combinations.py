"""Every head with every loss, and both with every coupling: three steps equal `reference.py`.

Most of these no paper has. The grid takes each pair of head and loss once; couplings and networks
rotate, so that each coupling meets each head and each loss. (`Augmented` gives an embedding only
where its blocks are residual: elsewhere it copies the network's classifier.) Then come cases with
dropout: real `nn.Dropout`, not a fixed mask, since what can go wrong is how often a module draws
and from which generator. The reference gets the states of the local modules' generators as they
were before the first batch, and draws from its own copies: body, head and loss of k from the k-th.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from networks import Cnn, Mlp, PreAct, ResNet, Tagger, Vit
from reference import Coupling
from reference_losses import CrossEntropy, InfoPro, PredSim
from torch import nn
from twin import DENORMALIZE, Case, check_three_steps

from lightning_local import couplings, heads, losses
from lightning_local.methods import LocalMethod

WEIGHT = 0.05
UNITS = {Cnn: 5, ResNet: 5, PreAct: 4, Mlp: 4, Vit: 4, Tagger: 4}

HEADS = {
    "linear": heads.Linear(),
    "pooled": heads.Linear(pool_features=24),
    "conv": heads.Conv(16),
    "mlp": heads.MLP(),
    "augmented": heads.Augmented(1),
}
COUPLINGS: dict[str, tuple[couplings.Coupling, Coupling]] = {
    "isolated": (couplings.Isolated(), Coupling()),
    "link": (couplings.BackwardLink(0.7), Coupling("backlink", 0.7)),
    "tail": (couplings.BackwardLink(length=1), Coupling("backlink", length=1)),
    "sgr": (couplings.GradientReconciliation(WEIGHT), Coupling("sgr", WEIGHT)),
    "sgr-cosine": (
        couplings.GradientReconciliation(WEIGHT, "cosine"),
        Coupling("sgr", WEIGHT, distance="cosine"),
    ),
}
LOSSES = ("cross-entropy", "predsim", "infopro", "infopro-contrast")


def loss_of(name: str, network: type[nn.Module]) -> tuple[Any, CrossEntropy]:
    """The package's loss and the reference's."""
    if name == "cross-entropy":
        return losses.CrossEntropy(), CrossEntropy()
    if name == "predsim":
        return losses.PredSim(beta=0.8), PredSim(beta=0.8)
    if name == "sim":
        return losses.PredSim(parts="sim"), PredSim(kind="sim")
    denormalize = DENORMALIZE[network]
    lams = {"lam_first": (2.0, 0.3), "lam_last": (0.5, 1.0)}
    contrast = name == "infopro-contrast"
    loss = losses.InfoPro(
        denormalize=denormalize, task="contrast" if contrast else "softmax", **lams
    )
    return loss, InfoPro(*denormalize, contrast, **lams)


def combination(
    head: str,
    loss: str,
    coupling: str,
    network: type[nn.Module],
    partition: Any = "units",
    sizes: tuple[int, ...] = (),
    dropout: float = 0.0,
) -> Case:
    mine, theirs = loss_of(loss, network)
    link, how = COUPLINGS[coupling]
    expected = list(sizes) or [1] * UNITS[network]
    if head == "augmented" and not sizes:
        expected[-2:] = [2]
    method = LocalMethod(HEADS[head], mine, link)
    name = f"{head}-{loss}-{coupling}-{network.__name__.lower()}"
    name += "-dropout" if dropout else ""
    return Case(name, network, method, expected, how, partition, loss=theirs, dropout=dropout)


GRID = [
    (head, loss, ("isolated", "link", "sgr")[(i + j) % 3], network)
    for ((j, loss), (i, head)), network in zip(
        itertools.product(enumerate(LOSSES), enumerate(HEADS)),
        itertools.cycle(UNITS),
    )
]
ROWS: list[tuple[Any, ...]] = [
    *GRID,
    # what the grid's rotation leaves out
    ("pooled", "predsim", "link", Cnn, 3, (2, 2, 1)),
    ("pooled", "predsim", "sgr", ResNet, 3, (2, 2, 1)),
    ("pooled", "predsim", "sgr", Vit),
    ("pooled", "predsim", "sgr-cosine", Mlp),
    ("pooled", "predsim", "link", Tagger),
    ("pooled", "predsim", "tail", PreAct, 2, (2, 2)),
    ("conv", "sim", "sgr", Cnn, 3, (2, 2, 1)),
    ("conv", "sim", "link", Tagger),
    ("conv", "infopro", "sgr", Cnn, 3, (2, 2, 1)),
    ("conv", "infopro", "sgr", Vit),
    ("conv", "infopro", "sgr-cosine", Tagger),
    ("conv", "infopro", "tail", PreAct, 2, (2, 2)),
    ("conv", "infopro", "link", Mlp),
    ("conv", "infopro-contrast", "link", ResNet, 3, (2, 2, 1)),
    ("conv", "infopro-contrast", "sgr", PreAct),
    ("conv", "infopro-contrast", "sgr-cosine", Mlp),
    ("mlp", "cross-entropy", "link", PreAct),
    ("mlp", "cross-entropy", "sgr", Cnn, 3, (2, 2, 1)),
    ("mlp", "cross-entropy", "sgr-cosine", Vit),
    ("augmented", "infopro", "link", ResNet),
    ("augmented", "infopro", "sgr", Cnn),
    ("augmented", "infopro-contrast", "sgr", ResNet),
    ("augmented", "predsim", "link", PreAct),
    ("augmented", "predsim", "sgr", Cnn),
    # an augmented head that begins by overwriting the hidden state its loss needs as it was
    ("augmented", "predsim", "isolated", PreAct, ["blocks.2"], (3, 1)),
    ("augmented", "infopro", "sgr", PreAct, ["blocks.2"], (3, 1)),
    # dropout
    ("pooled", "predsim", "isolated", Cnn, "units", (), 0.3),
    ("mlp", "predsim", "sgr", ResNet, 3, (2, 2, 1), 0.3),
    ("conv", "infopro", "link", Cnn, 3, (2, 2, 1), 0.3),
    ("conv", "infopro-contrast", "sgr", Vit, "units", (), 0.2),
    ("augmented", "predsim", "link", Vit, "units", (), 0.2),
    ("mlp", "cross-entropy", "tail", Mlp, 2, (2, 2), 0.2),
    ("linear", "infopro", "isolated", Tagger, "units", (), 0.2),
]
CASES = [combination(*row) for row in ROWS]


def test_every_pair_is_there() -> None:
    for first, second in itertools.combinations(
        (set(HEADS), set(LOSSES), {"isolated", "link", "sgr"}), 2
    ):
        found = {pair for row in GRID for pair in itertools.permutations(row[:3], 2)}
        assert set(itertools.product(first, second)) <= found
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_three_steps_equal_the_reference(case: Case) -> None:
    check_three_steps(case)
