"""The ResNets for small images that the local-learning papers train, with 6n + 2 layers.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2. One
difference: a shortcut whose shape changes is a 1x1 convolution with BatchNorm (option B of that
paper), as in the local-learning papers, which gives 466,906 parameters at depth 32 and 1,730,714
at depth 110 (10 classes, 3 input channels).

Shapes: N batch size, C channels, H and W the image's sides. Stage i = 1, 2, 3 holds n blocks of
width 16, 32, 64; stages 2 and 3 begin with a stride of 2.
"""

import math

from torch import Tensor, nn

__all__ = ["BasicBlock", "CifarResNet"]

_WIDTHS = (16, 32, 64)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    """A convolution without bias that keeps the sides of the image at stride 1."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=False,
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to a shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        activated: Tensor = self.relu(out)
        return activated


class CifarResNet(nn.Module):
    """A residual network for small images: stem, three stages of `BasicBlock`, classifier.

    Args:
        depth: Layers with weights on the main path, 6n + 2 with n >= 1 blocks per stage:
            8, 14, 20, 26, 32, ..., 110.
        num_classes: Size of the output.
        in_channels: Channels of the image: 3 for colour, 1 for grey.

    Raises:
        ValueError: If `depth` is not of the form 6n + 2, or another argument is below 1.

    Example:
        >>> network = CifarResNet(depth=32)
        >>> sum(parameter.numel() for parameter in network.parameters())
        466906
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            below = max(8, 6 * ((depth - 2) // 6) + 2)
            raise ValueError(
                f"depth={depth} is not 6n + 2 with n >= 1: "
                f"pass {below} or {below + 6}, for instance."
            )
        if num_classes < 1 or in_channels < 1:
            raise ValueError(
                f"num_classes={num_classes} and in_channels={in_channels}: both must be at least 1."
            )
        blocks = (depth - 2) // 6
        self.conv1 = _conv(in_channels, _WIDTHS[0], 3, 1)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(_WIDTHS[0], _WIDTHS[0], blocks, stride=1)
        self.layer2 = self._stage(_WIDTHS[0], _WIDTHS[1], blocks, stride=2)
        self.layer3 = self._stage(_WIDTHS[1], _WIDTHS[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_WIDTHS[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        """A row of blocks, the first of which changes the shape."""
        first = BasicBlock(in_channels, out_channels, stride)
        rest = [BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(N, in_channels, H, W)` to logits `(N, num_classes)`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(self.avgpool(out).flatten(1))
        return logits
