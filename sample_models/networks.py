"""Small convolutional networks whose checkpoints serve as convtool's samples.

All take 8x8 grey images as a tensor of shape (N, 1, 8, 8) and return 10 class scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


class Chains(nn.Module):
    """2-D convolutions in three linear chains, with an activation only between chains.

    The forward pass asks nothing of a chain's members but to be called, so a chain stays runnable after its
    first member is replaced by the fused convolution and the others by `nn.Identity`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(1, 6, 1)
        self.spread = nn.Conv2d(6, 12, 3)
        self.gather = nn.Conv2d(12, 16, 5, stride=2)
        self.widen = nn.Conv2d(16, 24, (3, 5), padding=(1, 2))
        self.narrow = nn.Conv2d(24, 12, 1)
        self.blur = nn.Conv2d(12, 12, 3, padding=1)
        self.sharpen = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12 * 4 * 4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores of shape (N, 10)."""
        # The border is added here and not by `reduce`, so that no member of the chain pads and the fusion is exact.
        x = F.pad(images, (3, 3, 3, 3))
        x = F.relu(self.gather(self.spread(self.reduce(x))))
        x = F.relu(self.narrow(self.widen(x)))
        # Not fusable: outside the image `sharpen` sees zeros, a fused kernel would see `blur` carried on past it.
        x = F.relu(self.sharpen(self.blur(x)))
        scores: Tensor = self.head(torch.flatten(x, 1))
        return scores


class ConvBatchNorm(nn.Module):
    """Convolution, batch norm, ReLU, four times; then a mean over the pixels and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False)
        # An eps other than the default: a checkpoint does not store it, so a fusion that assumes 1e-5 shows up here.
        self.bn2 = nn.BatchNorm2d(16, eps=1e-3)
        self.conv3 = nn.Conv2d(16, 24, 3, padding=1, groups=2, bias=False)
        self.bn3 = nn.BatchNorm2d(24)
        self.conv4 = nn.Conv2d(24, 24, 3, bias=False)
        self.bn4 = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores of shape (N, 10)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


class ConvBN(nn.Module):
    """A convolution without bias and its batch norm, under the names that RepVGG checkpoints use."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised convolution of x."""
        y: Tensor = self.bn(self.conv(x))
        return y


class RepVGGBlock(nn.Module):
    """Parallel linear branches, summed, then ReLU.

    The sum runs over whatever branches are registered: after a fusion, delete them all and add the merged
    convolution as `rbr_reparam`. (A branch replaced by `nn.Identity` would add its input to the sum.)
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.rbr_dense = ConvBN(inputs, outputs, kernel=3, stride=stride, padding=1)
        self.rbr_1x1 = ConvBN(inputs, outputs, kernel=1, stride=stride, padding=0)
        if inputs == outputs and stride == 1:
            self.rbr_identity = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified sum of the branches."""
        return F.relu(torch.stack([branch(x) for branch in self.children()]).sum(dim=0))


class RepVGGStyle(nn.Module):
    """Three RepVGG blocks, a mean over the pixels and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stage0 = RepVGGBlock(1, 16)
        self.stage1 = RepVGGBlock(16, 16)
        self.stage2 = RepVGGBlock(16, 32, stride=2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores of shape (N, 10)."""
        x = self.stage2(self.stage1(self.stage0(images)))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


class SeparableBlock1d(nn.Module):
    """Optional zero border, depthwise convolution, pointwise convolution, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, multiplier: int = 1, border: int = 0) -> None:
        super().__init__()
        self.border = border
        self.depthwise = nn.Conv1d(inputs, inputs * multiplier, 5, stride=stride, groups=inputs)
        self.pointwise = nn.Conv1d(inputs * multiplier, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified output of the pair."""
        return F.relu(self.pointwise(self.depthwise(F.pad(x, (self.border, self.border)))))


class Separable1d(nn.Module):
    """Depthwise-separable 1-D network that reads the 64 pixels, row after row, as one signal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 5, padding=2)
        self.block0 = SeparableBlock1d(8, 16)
        self.block1 = SeparableBlock1d(16, 24, multiplier=2, border=2)
        self.block2 = SeparableBlock1d(24, 24, stride=2)
        self.head = nn.Linear(24 * 28, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores of shape (N, 10)."""
        x = F.relu(self.stem(torch.flatten(images, 1).unsqueeze(1)))
        x = self.block2(self.block1(self.block0(x)))
        scores: Tensor = self.head(torch.flatten(x, 1))
        return scores


NETWORKS: dict[str, type[nn.Module]] = {
    "chains": Chains,
    "conv_bn": ConvBatchNorm,
    "repvgg": RepVGGStyle,
    "separable1d": Separable1d,
}
