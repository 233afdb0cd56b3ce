"""Networks of timm through the same door as every other: cut, composed back, trained, validated.

Each name stands for a family. Widths, depths and images are as small as the constructors take them,
and nothing is downloaded. What can't be cut is in a table too, with the words of its error.
"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from composing import CLASSES, Classifier, chain, check_composition
from settings import Recorder
from torch.nn import functional

from lightning_local import LocalLearner

timm = pytest.importorskip("timm")

LR = 0.01
VIT = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1, 2, 1)}
HEADS = {"num_heads": (1, 2, 2, 2)}
NEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 16)}
ONES = {"layers": (1, 1, 1, 1)}

# Name: (arguments, side of an image, units).
NETWORKS = {
    "beit_base_patch16_224": (VIT, 32, 4),
    "cait_xxs24_224": (VIT, 32, 5),
    "coatnet_pico_rw_224": (
        {"img_size": 32, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)},
        32,
        6,
    ),
    "convnext_atto": (NEXT, 32, 5),
    "convnextv2_atto": (NEXT, 32, 5),
    "deit3_small_patch16_224": (VIT, 32, 4),
    "densenet121": ({"growth_rate": 4, "block_config": (2, 2, 2, 2)}, 32, 8),
    "edgenext_xx_small": ({"depths": (1, 1, 2, 1)}, 32, 5),
    "eva02_tiny_patch14_224": ({**VIT, "img_size": 28}, 28, 4),
    "fastvit_t8": ({**ONES, "embed_dims": (8, 16, 16, 16)}, 32, 8),
    "hiera_tiny_224": ({"img_size": 32, "embed_dim": 12, "stages": (1, 1, 1, 1)}, 32, 5),
    "hrnet_w18_small": ({}, 32, 5),
    "levit_128s": ({"img_size": 32, "embed_dim": (16, 24, 32), "depth": (1, 1, 1)}, 32, 7),
    "mixer_s32_224": ({"img_size": 64}, 64, 9),
    "mobilenetv3_small_050": ({}, 32, 16),
    "mobilevitv2_050": ({}, 32, 25),
    "nf_resnet26": ({}, 32, 9),
    "poolformer_s12": ({}, 32, 5),
    "pvt_v2_b0": ({"depths": (1, 1, 1, 1)}, 32, 5),
    "regnetx_002": ({}, 32, 5),
    "repvgg_a0": ({}, 32, 22),
    "resmlp_12_224": ({"img_size": 32}, 32, 14),
    "resnest14d": ({}, 32, 7),
    "resnet10t": ({}, 32, 7),
    "seresnext26t_32x4d": (ONES, 32, 7),
    "starnet_s1": ({}, 32, 20),
    "swin_tiny_patch4_window7_224": ({**SWIN, **HEADS}, 32, 5),
    "swinv2_tiny_window8_256": ({**SWIN, **HEADS}, 32, 5),
    "test_vit": ({}, 32, 7),  # of any size of image
    "tinynet_e": ({}, 32, 14),
    "vit_small_patch16_dinov3": (VIT, 32, 4),
    "vit_tiny_patch16_224": (VIT, 32, 4),
    "xcit_nano_12_p16_224": (
        {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2},
        32,
        9,
    ),
}

# Name: (arguments, side of an image, the error).
REFUSED = {
    # Blocks of a stage share their convolutional position encodings.
    "coat_lite_tiny": (
        {"img_size": 32, "embed_dims": (16, 16, 16, 16), "serial_depths": (2, 1, 1, 1)},
        32,
        r"`serial_blocks1.1.cpe.proj.weight` is used on both sides of a cut .* Untie it, or choose",
    ),
    # Inner tokens of all patches come before the batch.
    "tnt_s_patch16_224": (
        {"img_size": 32, "depth": 1},
        32,
        r"after `pixel_embed.proj` .* first dimension has to be the batch .* Cut elsewhere",
    ),
}


class Lit(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", functional.cross_entropy(self.network(x), y))


def made(name, options, side):
    network = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
    return network, torch.randn(2, 3, side, side), torch.randint(CLASSES, (2,))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_timm_is_cut_composed_back_and_trained(name, quiet, tmp_path):
    options, side, units = NETWORKS[name]
    network, x, y = made(name, options, side)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    learner = LocalLearner(Lit(network), "Greedy")
    learner.build(x)
    bodies = [module.body for module in learner.local_modules]
    assert len(bodies) == units

    check_composition(network, bodies, x)
    recorder = Recorder()
    loader = torch.utils.data.DataLoader([(x, y)], batch_size=None)
    trainer = L.Trainer(
        **quiet,
        max_steps=1,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        callbacks=[recorder],
    )
    trainer.fit(learner, loader, loader)
    assert len(recorder.losses[0]) == units
    for name, parameter in network.named_parameters():
        gradient = recorder.gradients[0][f"module.network.{name}"]
        assert gradient is not None, f"{name} got no gradient"
        assert torch.equal(parameter, before[name].add(gradient, alpha=-LR)), name
    assert learner.module.network is network
    assert list(network.state_dict()) == list(before)
    with torch.no_grad():
        loss = functional.cross_entropy(network.eval()(x), y)
    assert torch.equal(trainer.callback_metrics["val/loss"], loss)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_says_why_and_what_to_do(name, quiet, tmp_path):
    options, side, words = REFUSED[name]
    network, x, y = made(name, options, side)
    with pytest.raises(ValueError, match=words):
        LocalLearner(Lit(network), "Greedy").build(x)


def test_a_network_that_cannot_be_cut_trains_end_to_end(quiet, tmp_path):
    options, side, _ = REFUSED["tnt_s_patch16_224"]
    network, x, y = made("tnt_s_patch16_224", options, side)
    before = network.head.weight.detach().clone()
    loader = torch.utils.data.DataLoader([(x, y)], batch_size=None)
    trainer = L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path)
    trainer.fit(LocalLearner(Classifier(network), "EndToEnd"), loader)
    assert not torch.equal(network.head.weight, before)


def test_stages_are_cut_inside_where_split_points_say_so():
    """A stage of timm is a module of its own, so a unit as a whole."""
    options, side, _ = NETWORKS["convnext_atto"]
    network, x, _ = made("convnext_atto", options, side)
    points = ["stages.1", "stages.2.blocks.0", "stages.2"]
    learner = LocalLearner(Lit(network), "Greedy", points)
    learner.build(x)
    assert learner.split_points == tuple(points)
    bodies = [module.body for module in learner.local_modules]
    assert torch.equal(chain(bodies, x), network(x))
