"""One thread: the tensors here are small, and threads that wait for each other on a busy machine cost minutes.

Without a GPU, Triton's kernels run in Triton's interpreter, which has to be asked for before Triton is imported.
"""

import os

import torch

torch.set_num_threads(1)

# Tolerances are those of float32: a GPU would convolve with ten bits of it less.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
