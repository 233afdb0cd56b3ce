"""A small vision transformer, written out: pre-norm blocks over patches, and no class token.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with the mean of the tokens in place
of the class token. For ImageNet take `torchvision.models.VisionTransformer`.

Shapes: N batch size, C channels, H and W the image's sides, T tokens (patches), D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TinyViT"]


class EncoderBlock(nn.Module):
    """Attention and a perceptron of twice the width, each behind a norm and added to its input.

    Args:
        width: D, a multiple of `heads`.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `(N, T, D)` to tokens."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        mapped: Tensor = x + self.mlp(self.norm2(x))
        return mapped


class TinyViT(nn.Module):
    """A vision transformer for small images: patches, blocks, the tokens' mean, classifier.

    Args:
        image_size: Side of the square images in pixels, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the image: 3 for colour, 1 for grey.
        width: Features per token, a multiple of `heads`.
        layers: Blocks.
        heads: Attention heads per block.
        num_classes: Size of the output.

    Raises:
        ValueError: If a size does not divide into its parts, or an argument is below 1.

    Example:
        >>> TinyViT()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        in_channels: int = 1,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        for name, value in (
            ("image_size", image_size),
            ("patch_size", patch_size),
            ("in_channels", in_channels),
            ("width", width),
            ("layers", layers),
            ("heads", heads),
            ("num_classes", num_classes),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: pass at least 1.")
        if image_size % patch_size:
            raise ValueError(
                f"image_size={image_size} is no multiple of patch_size={patch_size}: "
                "pass a patch_size that divides it."
            )
        if width % heads:
            raise ValueError(
                f"width={width} is no multiple of heads={heads}: "
                f"pass {heads * (width // heads + 1)}, for instance."
            )
        tokens = (image_size // patch_size) ** 2
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(N, in_channels, image_size, image_size)` to logits `(N, num_classes)`."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        tokens = self.norm(self.blocks(tokens))
        logits: Tensor = self.fc(tokens.mean(dim=1))
        return logits
