"""One thread: the tensors here are small, and threads that wait for each other on a busy machine cost minutes.

A background job of a script ignores Ctrl-C, and one under nohup SIGHUP; the runs of these tests are to hear both.

Without a GPU, Triton's kernels run in Triton's interpreter, which has to be asked for before Triton is imported.
"""

import os
import signal

import torch

torch.set_num_threads(1)

for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

# Tolerances are those of float32: a GPU would convolve with ten bits of it less.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
