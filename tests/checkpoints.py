"""What tests read out of checkpoints, in one place: a test that runs on a GPU alone must not be the first to look for a key."""

import torch


def loss_scale(path):
    """The scale of a float16 run's loss, as ``path`` (last.pt) holds it."""
    return torch.load(path, weights_only=True)["execution"]["scaler"]["scale"]
