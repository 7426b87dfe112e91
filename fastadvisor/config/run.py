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
    """Continue the run in --output from its last.pt; auto: or begin it, if there is none (what a preemptible job types)."""
    save_minutes: NonNegative = 10.0
    """Save so often within an epoch, too; 0: only at the end of each."""
    save_every: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Save every so many iterations as well; 0: no such rule."""
    keep: Count = 1
    """Checkpoints to keep, newest first; more than one: as iteration-<number>.pt beside last.pt."""
    dry_run: Annotated[bool, ESSENTIAL] = False
    """Check everything, time ten iterations, write nothing."""
    progress: bool = True
    """Progress bar, and a line an epoch; off: nothing but the result, and what one must know."""
    tensorboard: bool = True
    """TensorBoard files in the run folder, where tensorboard is installed."""


@dataclass
class DeviceConfig:
    """What the run is computed on, and in which precision."""

    TITLE: ClassVar = "Device and precision"

    device: Annotated[Literal["auto", "cpu", "cuda"], ESSENTIAL] = "auto"
    """Where to compute; auto: on a GPU where there is one."""
    amp: Annotated[bool, ESSENTIAL] = False
    """Mixed precision: forward passes of the classifier by autocast; losses, advisor and statistics stay in float32."""
    amp_dtype: Annotated[Literal["auto", "bfloat16", "float16"], Only(amp=True)] = "auto"
    """--amp: auto: bfloat16, or float16 with a scaled loss on GPUs without it."""
    memory_format: Literal["auto", "contiguous", "channels-last"] = "auto"
    """Images and weights in memory as NCHW or NHWC; auto: channels-last with --amp on a GPU, whose convolutions want it."""
    tf32: bool = False
    """Float32 matrix products in TF32, on GPUs that have it (convolutions are anyway, which is torch's default)."""
    cuda_graph: Literal["auto", "on", "off"] = "off"
    """Record a whole iteration as a CUDA graph and replay it, which spares a GPU the wait for its launches. on: end where that
    cannot be; auto: on a GPU, where it can be; off: launch operations one by one, until the rest has run on a GPU."""
    sync_bn: bool = False
    """Several processes: batch normalisation over all their images, instead of each over its own."""
    keep_memory: bool = True
    """CPU: keep freed memory in the process instead of returning it to the system at every step (glibc)."""
    eval_batch_size: Count = 500
    """Images a forward pass when testing."""


@dataclass
class SafetyConfig:
    """Chance, and numbers that go wrong."""

    TITLE: ClassVar = "Seed and bad numbers"

    seed: Annotated[int, Field(ge=0, lt=2**32), ESSENTIAL] = 0
    """Seed of everything: meta-set, long tail, noise, weights, data order."""
    deterministic: bool = False
    """Only operations that give the same numbers every time, on a GPU too; slower there."""
    nan_policy: Literal["stop", "skip", "ignore"] = "stop"
    """Values that are not finite. stop: end the run, and save replay.pt; skip: leave that step out and count it; ignore: look
    at the end of each epoch only, which spares waiting for the device twice a step."""


@dataclass
class RunConfig(SafetyConfig, DeviceConfig, OutputConfig):
    """Where and how it runs."""
