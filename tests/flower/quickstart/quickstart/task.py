"""A node's training; ``model`` has the network and its images."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from quickstart.model import IMAGES, Net, images, train


def trained(
    state: dict[str, torch.Tensor], part: int, round: int, lr: float
) -> tuple[dict[str, torch.Tensor], float, int]:
    """Train one epoch on the images of a part; the new model, its loss, and how many they are."""
    examples = IMAGES - 8 * part
    own = TensorDataset(*(values[:examples] for values in images(IMAGES, 2, part).tensors))
    order = torch.Generator().manual_seed(100 * round + part)
    net = Net()
    net.load_state_dict(state)
    loss = train(net, DataLoader(own, 8, shuffle=True, generator=order), epochs=1, lr=lr)
    return net.state_dict(), loss, examples
