"""Live models of the golden cases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Few(nn.Module):
    """The layers of few.safetensors: two convolutions, a batch norm, a linear layer."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, (3, 2), stride=stride)
        self.second = nn.Conv2d(4, 5, (1, 2))
        self.norm = nn.BatchNorm2d(5, eps=1e-3)
        self.tail = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return two numbers for each position of three channels."""
        y: Tensor = self.tail(self.norm(self.second(self.first(x))).relu()[:, :3].movedim(1, -1))
        return y


class Branches(nn.Module):
    """Sums, a stack along the channels, a scale, a transposed layer, a flatten."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.b = nn.Conv2d(3, width, 1)
        self.c = nn.Conv2d(2 * width, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.bn = nn.BatchNorm2d(4)
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))
        self.depth = nn.Conv2d(4, 4, 3, groups=4)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(4 * 7 * 7, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return two numbers."""
        y = F.relu(self.c(torch.cat([self.a(x) + self.b(x), 0.5 * self.b(x)], 1)))
        y = F.relu(self.bn(self.up(y)) * self.gamma)
        z: Tensor = self.last(self.head(torch.flatten(self.pool(self.depth(y)), 1)))
        return z


def fails() -> nn.Module:
    """Raise an error."""
    raise ValueError("no such network")


def leaves() -> nn.Module:
    """Exit."""
    raise SystemExit(3)
