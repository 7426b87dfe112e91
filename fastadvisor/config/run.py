"""Settings of the run: where, on what, and how it is guarded."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fastadvisor.config.metadata import ESSENTIAL, Count, NonNegative, Only


@dataclass
class OutputConfig:
    """What a run leaves, and when."""

    TITLE: ClassVar = "Output"

    output: Annotated[str | None, ESSENTIAL] = None
    """Run folder; none: a new one under runs/."""
    resume: Annotated[bool | Literal["auto"], ESSENTIAL] = False
    """Continue the run in --output from its last.pt; auto: continue it if there is one, else begin it (for preemptible
    jobs)."""
    save_minutes: NonNegative = 10.0
    """Minutes from one save to the next within an epoch; 0: save only at the end of each epoch."""
    save_every: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Save every so many iterations as well; 0: do not."""
    keep: Count = 1
    """Newest checkpoints to keep; more than 1 are kept as iteration-<number>.pt beside last.pt."""
    dry_run: Annotated[bool, ESSENTIAL] = False
    """Check everything, time ten iterations, write nothing."""
    progress: bool = True
    """Show a progress bar and a line for each epoch; off: only the result and warnings."""
    tensorboard: bool = True
    """Write TensorBoard files to the run folder, if tensorboard is installed."""


@dataclass
class DeviceConfig:
    """What the run is computed on, and in which precision."""

    TITLE: ClassVar = "Device and precision"

    device: Annotated[Literal["auto", "cpu", "cuda"], ESSENTIAL] = "auto"
    """Device to compute on; auto: a GPU if there is one."""
    amp: Annotated[bool, ESSENTIAL] = False
    """Mixed precision: forward passes of the classifier run under autocast; losses, advisor and statistics stay in float32."""
    amp_dtype: Annotated[Literal["auto", "bfloat16", "float16"], Only(amp=True)] = "auto"
    """Type that --amp computes in; auto: bfloat16, or float16 with a scaled loss on GPUs without bfloat16."""
    memory_format: Literal["auto", "contiguous", "channels-last"] = "auto"
    """Memory layout of images and weights: contiguous (NCHW) or channels-last (NHWC); auto: channels-last with --amp on a GPU,
    where convolutions are faster in it."""
    tf32: bool = False
    """Compute float32 matrix products in TF32 on GPUs that have it. Convolutions use TF32 in any case, as is torch's
    default."""
    cuda_graph: Literal["auto", "on", "off"] = "off"
    """Record a whole iteration as a CUDA graph and replay it, so that a GPU does not wait for launches. on: stop with an error
    where it is not possible; auto: on a GPU, where it is possible; off: launch operations one by one."""
    sync_bn: bool = False
    """Several processes: compute batch normalisation over the images of all processes, instead of over those of each."""
    keep_memory: bool = True
    """CPU: keep freed memory in the process instead of returning it to the system at every step (glibc)."""
    eval_batch_size: Count = 500
    """Images in a batch when testing."""


@dataclass
class SafetyConfig:
    """The seed, and what happens to values that are not finite."""

    TITLE: ClassVar = "Seed and bad numbers"

    seed: Annotated[int, Field(ge=0, lt=2**32), ESSENTIAL] = 0
    """Seed of everything: meta-set, long tail, noise, weights, data order."""
    deterministic: bool = False
    """Use only deterministic operations, so that a run on a GPU can be repeated exactly; slower there."""
    nan_policy: Literal["stop", "skip", "ignore"] = "stop"
    """What to do about infinities and NaN. stop: end the run and save replay.pt; skip: leave that step out and count it;
    ignore: look only at the end of each epoch, which saves two synchronisations with the device in each step."""


@dataclass
class RunConfig(SafetyConfig, DeviceConfig, OutputConfig):
    """What a run is computed on, what it leaves, and its seed."""
