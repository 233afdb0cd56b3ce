"""Fifteen torchvision families: cut into four, composed back bit for bit, trained for one step.

The classes and their forwards are torchvision's own; widths and images are as small as their
constructors allow.
"""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from composing import CLASSES, Classifier, check_composition
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck

from lightning_local import LocalLearner, Partition, methods


def small_vgg() -> nn.Module:
    """vgg16_bn without the 120 million weights of its classifier, which no argument makes fewer."""
    with torch.device("meta"):
        network = models.vgg16_bn(init_weights=False)
    network.to_empty(device="cpu")
    for i, sizes in {0: (512 * 7 * 7, 16), 3: (16, 16), 6: (16, CLASSES)}.items():
        network.classifier[i] = nn.Linear(*sizes)
    for module in network.features:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


def small_vit() -> nn.Module:
    network = models.VisionTransformer(32, 16, 12, 2, 16, 32, num_classes=CLASSES)
    # torchvision starts the head at zero, through which nothing comes back in the first step.
    nn.init.normal_(network.heads.head.weight)
    return network


def small_convnext() -> nn.Module:
    stages = zip((6, 12, 24, 48), (12, 24, 48, None), (3, 3, 9, 3), strict=True)
    # With the default 1e-6 one step would move some weights by less than a float can hold.
    return models.ConvNeXt([CNBlockConfig(*stage) for stage in stages], 0.1, layer_scale=0.1)


# Family: (its network, units as a person would count them).
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (models.resnet18, 1 + 8),
    "resnet50": (lambda: models.ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=8), 1 + 16),
    "vgg16_bn": (small_vgg, 13),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 1 + 11 + 1),
    "efficientnet_b0": (models.efficientnet_b0, 1 + 16 + 1),
    "convnext_tiny": (small_convnext, 1 + 18 + 3),
    "vit_b_16": (small_vit, 1 + 12),
    "swin_t": (
        lambda: models.SwinTransformer([4, 4], 16, [2, 2, 6, 2], [1, 2, 4, 8], [2, 2]),
        1 + 12 + 3,
    ),
    "densenet121": (lambda: models.DenseNet(4, (2, 3, 4, 3), 8), 1 + 4 + 3),
    "regnet_y_400mf": (models.regnet_y_400mf, 1 + 16),
    "googlenet": (lambda: models.googlenet(aux_logits=False, init_weights=False), 3 + 9),
    "maxvit_t": (
        lambda: models.MaxVit((64, 64), 8, 2, [8, 16, 16, 24], [1, 1, 1, 1], 8, 0.2),
        2 + 4,
    ),
    "shufflenet_v2_x1_0": (models.shufflenet_v2_x1_0, 1 + 16 + 1),
    "mnasnet1_0": (models.mnasnet1_0, 3 + 16 + 1),
    "squeezenet1_0": (models.squeezenet1_0, 1 + 8 + 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_cut_composed_back_and_trained(family, quiet, tmp_path):
    make, units = FAMILIES[family]
    network, side = make(), 64 if family == "maxvit_t" else 32
    x, y = torch.randn(4, 3, side, side), torch.randint(CLASSES, (4,))
    learner = LocalLearner(Classifier(network), methods.Greedy(), Partition(num_modules=4))
    learner.build(x)
    bodies = [module.body for module in learner.local_modules]
    assert len(bodies) == 4
    assert len(learner.cutting.unit_points) + 1 == units

    check_composition(network, bodies, x)
    owned = [dict(body.named_parameters()) for body in bodies]
    assert sorted(n for names in owned for n in names) == sorted(
        n for n, _ in network.named_parameters()
    )
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    loader = torch.utils.data.DataLoader([(x, y)], batch_size=None)
    L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path).fit(learner, loader)
    for k, names in enumerate(owned):
        same = [n for n in names if torch.equal(network.get_parameter(n), before[n])]
        assert not same, f"local module {k} of {family} did not train these"
