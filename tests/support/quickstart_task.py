"""The task of Flower's PyTorch quickstart, its network included, on images made from a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

CLASSES, IMAGES, TEST = 10, 64, 500


class Net(nn.Module):
    """The network of the quickstart: 62,006 parameters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(3, 6, 5)
            self.pool = nn.MaxPool2d(2, 2)
            self.conv2 = nn.Conv2d(6, 16, 5)
            self.fc1 = nn.Linear(16 * 5 * 5, 120)
            self.fc2 = nn.Linear(120, 84)
            self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = functional.relu(self.fc1(x))
        return self.fc3(functional.relu(self.fc2(x)))


def images(count: int, *names: int) -> TensorDataset:
    """Coarse patterns, one for each class, under noise."""
    patterns = np.random.default_rng(1).normal(size=(CLASSES, 3, 4, 4))
    patterns = patterns.repeat(8, axis=2).repeat(8, axis=3)
    rng = np.random.default_rng(names)
    labels = rng.integers(CLASSES, size=count)
    pixels = 0.3 * patterns[labels] + rng.normal(size=(count, 3, 32, 32))
    return TensorDataset(torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels))


def load_data(partition_id: int, num_partitions: int, seed: int = 0) -> DataLoader:
    """The images of one node, in an order of the seed."""
    order = torch.Generator().manual_seed(seed * num_partitions + partition_id)
    return DataLoader(images(IMAGES, 2, partition_id), 8, shuffle=True, generator=order)


def train(net: Net, loader: DataLoader, epochs: int, lr: float) -> float:
    """Local training; the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for pixels, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(pixels), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return float(np.mean(losses))


def accuracy(net: Net) -> float:
    """On images that no node has."""
    pixels, labels = images(TEST, 3).tensors
    with torch.no_grad():
        return float((net(pixels).argmax(1) == labels).float().mean())
