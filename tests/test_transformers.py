"""Networks of Hugging Face's transformers, with random weights: as they are, or part by part.

What torch.fx follows is cut as it is. Of the others a module of the user's calls embeddings, blocks
and head one by one; its output is the whole network's, bit for bit.
"""

from __future__ import annotations

import copy
from functools import partial

import lightning as L
import pytest
import torch
from composing import CLASSES, chain
from fleet import differences, together, trainer
from hugging_face import (
    BLOCKS,
    IMAGES,
    LR,
    TEXT,
    UNTIED,
    Gpt2,
    Lit,
    LitParts,
    LitText,
    LitTextParts,
    Vit,
    bert,
    gemma,
    gpt2,
    images,
    llama,
    made,
    next_tokens,
    texts,
)
from settings import Recorder
from torch.utils.data import DataLoader

from lightning_local import LocalLearner, methods
from lightning_local.wrapping import as_inputs

DISTILLED = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}
SWIN |= {"window_size": 4, "num_labels": CLASSES}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 2, 1]}


# Name: (its network, a batch, units).
AS_THEY_ARE = {
    "BeitForImageClassification": (IMAGES, images, 4),
    "BertForSequenceClassification": ({**TEXT, **BLOCKS}, texts, 4),
    "DebertaV2ForSequenceClassification": ({**TEXT, **BLOCKS}, texts, 4),
    "Dinov2ForImageClassification": (IMAGES, images, 4),
    "DistilBertForSequenceClassification": ({**TEXT, **DISTILLED}, texts, 5),
    "RegNetForImageClassification": ({**STAGES, "groups_width": 4, "num_labels": 5}, images, 5),
    "RobertaForSequenceClassification": ({**TEXT, **BLOCKS}, texts, 4),
    "SwinForImageClassification": (SWIN, images, 3),
    "ViTForImageClassification": (IMAGES, images, 4),
}
LANGUAGE_MODELS = {
    "a Gemma": (lambda: gemma(), 4),
    "a GPT-2": (lambda: gpt2(**UNTIED), 5),
    "a GPT-2 with a mask of floats": (lambda: gpt2(**UNTIED, attn_implementation="eager"), 5),
    "a Llama": (lambda: llama(), 4),
}


def check(learner, batch, units, quiet, tmp_path):
    """Composes the bodies, and trains them for a step."""
    module, network = learner.module, learner.network
    inputs = as_inputs(learner.unpack(batch)[0])
    learner.build(*inputs)
    assert len(learner.local_modules) == units
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    plain = copy.deepcopy(module)
    plain.loss(batch).backward()
    used = {name for name, parameter in plain.named_parameters() if parameter.grad is not None}
    bodies = [module.body for module in learner.local_modules]
    for training in (True, False):
        network.train(training)
        outputs = []
        for forward in (network, partial(chain, bodies)):
            torch.manual_seed(0)
            outputs.append(forward(*inputs))
        assert type(outputs[0]) is type(outputs[1])
        tensors = [output if torch.is_tensor(output) else output.logits for output in outputs]
        assert torch.equal(*tensors), f"training={training}"

    network.load_state_dict(before)
    network.train()
    recorder, loader = Recorder(), DataLoader([batch], batch_size=None)
    options = {"default_root_dir": tmp_path, "num_sanity_val_steps": 0, "callbacks": [recorder]}
    trainer = L.Trainer(**quiet, **options, max_steps=1)
    trainer.fit(learner, loader, loader)
    assert len(recorder.losses[0]) == units
    for name, parameter in module.named_parameters():
        gradient, old = recorder.gradients[0][f"module.{name}"], before[name.partition(".")[2]]
        assert (gradient is not None) == (name in used), name
        if name in used:
            assert torch.equal(parameter, old.add(gradient, alpha=-LR)), name
    assert list(network.state_dict()) == list(before)
    module.eval()
    with torch.no_grad():
        assert torch.equal(trainer.callback_metrics["val/loss"], module.loss(batch))


@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_a_network_of_transformers_is_cut_as_it_is(kind, quiet, tmp_path):
    options, data, units = AS_THEY_ARE[kind]
    check(LocalLearner(Lit(made(kind, **options)), "Greedy"), data(), units, quiet, tmp_path)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_is_cut_as_it_is(name, quiet, tmp_path):
    make, units = LANGUAGE_MODELS[name]
    check(
        LocalLearner(LitText(make()), "Greedy", unpack=next_tokens), texts(), units, quiet, tmp_path
    )


def weights_of(make, network):
    """What a fit leaves of a language model."""
    L.seed_everything(0, verbose=False)
    learner = LocalLearner(LitText(network()), "BackLink", unpack=next_tokens)
    torch.manual_seed(1)
    loader = DataLoader([texts() for _ in range(3)], batch_size=None)
    make(max_epochs=1).fit(learner, loader, loader)
    return {"network": learner.module.state_dict()}


def in_two_stages(rank, quiet, network):
    strategy = {"send_input": True}  # the loss reads the tokens
    return weights_of(partial(trainer, rank, 2, quiet, strategy=strategy), network)


@pytest.mark.parametrize("network", [llama, gemma])
def test_a_language_model_in_two_processes_is_one_process(network, quiet):
    """Rotary tables and the mask travel with the hidden state."""
    one = weights_of(partial(L.Trainer, **quiet), network)
    for found in together(2, in_two_stages, quiet, network):
        assert not differences(one, found)


def test_heads_built_of_a_networks_own_units(quiet, tmp_path):
    learner = LocalLearner(Lit(bert()), methods.AugLocal(depth=1))
    check(learner, texts(), 3, quiet, tmp_path)


@pytest.mark.parametrize("method", ["Greedy", "AugLocal"])
def test_a_vit_part_by_part(method, quiet, tmp_path):
    network, batch = Vit(), images()
    expected = network.model(**{"pixel_values": batch["pixel_values"]}).logits
    assert torch.equal(network(batch["pixel_values"]), expected)
    units = {"Greedy": 4, "AugLocal": 2}[method]
    check(LocalLearner(LitParts(network), method), batch, units, quiet, tmp_path)


@pytest.mark.parametrize("method", ["Greedy", "AugLocal"])
def test_a_gpt2_part_by_part(method, quiet, tmp_path):
    network, batch = Gpt2(), texts()
    expected = network.eval().model(input_ids=batch["input_ids"]).logits
    assert torch.equal(network(batch["input_ids"]), expected)
    network.train()
    learner = LocalLearner(LitTextParts(network), method, unpack=next_tokens)
    check(learner, batch, {"Greedy": 4, "AugLocal": 2}[method], quiet, tmp_path)


def fitted(module, batch, quiet, **options):
    loader = DataLoader([batch], batch_size=None)
    learner = LocalLearner(module, "Greedy", **options)
    L.Trainer(**quiet, max_steps=1).fit(learner, loader, loader)


FOLLOW = (
    r"one unit, so it is trained end to end.* {} can't be followed .*{}.*\n.*{}.*\n.*parts one by"
)


def test_a_network_that_cannot_be_followed_says_where_and_trains_end_to_end(quiet):
    network = gpt2()
    before = copy.deepcopy(network.state_dict())
    words = FOLLOW.format("GPT2Model", "DynamicCache .* use_cache=False", "hidden_states = block")
    with pytest.warns(UserWarning, match=words):
        fitted(LitText(network), texts(), quiet, unpack=next_tokens)
    assert any(not torch.equal(v, before[n]) for n, v in network.state_dict().items())


class WithMask(Lit):
    def logits(self, batch):
        return self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class Whole(Lit):
    def loss(self, batch):
        return self.model(**batch).loss


def test_a_mask_has_to_be_unpacked(quiet, tmp_path):
    batch = texts()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(ValueError, match=r"with 2 inputs, .* gives 1: .*unpack=.* a tuple in the"):
        fitted(WithMask(bert()), batch, quiet)

    def unpack(batch):
        return (batch["input_ids"], batch["attention_mask"]), batch["labels"]

    learner = LocalLearner(WithMask(bert()), "Greedy", unpack=unpack)
    check(learner, batch, 4, quiet, tmp_path)


def test_the_loss_is_left_to_training_step(quiet):
    with pytest.raises(ValueError, match=r"labels=.* has to leave the loss to training_step"):
        fitted(Whole(bert()), texts(), quiet)


def test_tied_embeddings_are_refused(quiet):
    words = r"`model.lm_head.weight` is used on both sides of a cut \(as `model.transformer.wte"
    with pytest.raises(ValueError, match=f"{words}.* Untie it"):
        fitted(LitTextParts(Gpt2(tie_word_embeddings=True)), texts(), quiet, unpack=next_tokens)


def test_an_output_of_several_tensors_needs_out_features():
    network = made("Dinov2Model", **{name: IMAGES[name] for name in (*BLOCKS, "image_size")})
    with pytest.raises(ValueError, match=r"returns BaseModelOutputWithPool.*out_features=\.\.\."):
        LocalLearner(Lit(network), "Greedy").build(images()["pixel_values"])
