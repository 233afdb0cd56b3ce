"""A small decoder-only language model and its plain LightningModule."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.nn import functional

__all__ = ["Gpt", "LitGpt"]


class Attention(nn.Module):
    """Causal self-attention of several heads.

    Args:
        width: Features of a token.
        heads: A divisor of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(N, T, C)` to the same shape."""
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.inner(x).chunk(3, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: torch.Tensor = self.outer(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and added to its input.

    Args:
        width: Features of a token.
        heads: Of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(N, T, C)` to the same shape."""
        x = x + self.attention(self.norm1(x))
        result: torch.Tensor = x + self.perceptron(self.norm2(x))
        return result


class Gpt(nn.Module):
    """A decoder-only transformer with learned positions, the norms first.

    Args:
        layers: Number of blocks.
        width: Features of a token.
        heads: Of each attention.
        context: Most tokens of a text.
        vocabulary: Number of different tokens.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens `(N, T)` to logits `(N, T, V)` of the tokens that follow."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        result: torch.Tensor = self.logits(self.norm(self.blocks(x)))
        return result


class LitGpt(L.LightningModule):
    """Cross entropy per token, and AdamW.

    Args:
        network: Maps tokens to logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        """Loss of one batch: tokens and those that follow them, `(N, T)` both."""
        tokens, following = batch
        logits = self.network(tokens)
        loss = functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-4)
