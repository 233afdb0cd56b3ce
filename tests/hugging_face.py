"""Networks of Hugging Face's transformers with random weights, modules around them, and batches."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from composing import CLASSES
from torch import nn
from torch.nn import functional

transformers = pytest.importorskip("transformers", minversion="5")

LR = 0.01
TOKENS = 50
BLOCKS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IMAGES = {"image_size": 32, "patch_size": 8, "num_labels": CLASSES, **BLOCKS}
TEXT = {
    "vocab_size": TOKENS,
    "max_position_embeddings": 16,
    "num_labels": CLASSES,
    **{f"{name}_token_id": i for i, name in enumerate(("bos", "eos", "pad"))},
}
UNTIED = {"tie_word_embeddings": False, "use_cache": False}


def made(kind, **options):
    """A network by the name of its class."""
    network = getattr(transformers, kind)
    return network(network.config_class(**options))


def gpt2(**options):
    sizes = {"vocab_size": TOKENS, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 2}
    return made("GPT2LMHeadModel", bos_token_id=0, eos_token_id=1, **sizes, **options)


def llama():
    return made("LlamaForCausalLM", **TEXT, **BLOCKS, **UNTIED, num_key_value_heads=2)


def gemma():
    sizes = {"num_key_value_heads": 2, "head_dim": 16}
    return made("Gemma2ForCausalLM", **TEXT, **BLOCKS, **UNTIED, **sizes)


def images(samples=4):
    pixels = torch.randn(samples, 3, 32, 32)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (samples,))}


def texts(samples=4):
    ids = torch.randint(3, TOKENS, (samples, 8))
    return {"input_ids": ids, "labels": torch.randint(CLASSES, (samples,))}


class Vit(nn.Module):
    """A ViTForImageClassification, part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.model = made("ViTForImageClassification", **IMAGES)

    def forward(self, pixel_values):
        vit = self.model.vit
        x = vit.embeddings(pixel_values)
        for layer in vit.layers:
            x = layer(x)
        return self.model.classifier(vit.layernorm(x)[:, 0])


class Gpt2(nn.Module):
    """A GPT2LMHeadModel, part by part; its attention is causal by itself, without a mask."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.model = gpt2(**{"tie_word_embeddings": False, **options})

    def forward(self, input_ids):
        gpt = self.model.transformer
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = gpt.drop(gpt.wte(input_ids) + gpt.wpe(positions))
        for block in gpt.h:
            x = block(x)
        return self.model.lm_head(gpt.ln_f(x))


class Lit(L.LightningModule):
    """As users write it for an `AutoModelFor...`."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def logits(self, batch):
        key = self.model.main_input_name
        return self.model(**{key: batch[key]}).logits

    def loss(self, batch):
        return functional.cross_entropy(self.logits(batch), batch["labels"])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


class LitParts(Lit):
    """The same for a module that returns the logits themselves."""

    def logits(self, batch):
        return self.model(batch["pixel_values" if "pixel_values" in batch else "input_ids"])


class LitText(Lit):
    """Predicts the next token: labels are the tokens themselves, moved by one."""

    def loss(self, batch):
        return functional.cross_entropy(self.logits(batch).flatten(0, 1), moved(batch).flatten())


class LitTextParts(LitText, LitParts):
    pass


def moved(batch):
    return functional.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)


def next_tokens(batch):
    return batch["input_ids"], moved(batch)


def bert():
    return made("BertForSequenceClassification", **TEXT, **BLOCKS)
