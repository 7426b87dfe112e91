"""One thread: the tensors here are small, and threads that wait for each other on a busy machine cost minutes."""

import torch

torch.set_num_threads(1)
