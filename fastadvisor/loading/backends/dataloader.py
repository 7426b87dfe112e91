"""The DataLoader of torch: each worker process makes whole batches, with torchvision's decoder and transforms."""

import gc
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing import queues
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import v2

from fastadvisor.datasets.images import Images
from fastadvisor.errors import UserError, too_many_open_files
from fastadvisor.loading.backends.resize import resize_for_testing, resize_to_square
from fastadvisor.loading.backends.stream import Decoded, make_samples
from fastadvisor.loading.decode import decode_rgb, read_encoded
from fastadvisor.loading.geometry import MIRROR, Draws, Geometry
from fastadvisor.loading.jpeg import plain_jpeg_size
from fastadvisor.loading.order import Spec
from fastadvisor.runtime.allocator import return_freed_memory

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # torchvision has announced that a later release will not have it
    decode_image = None

SHARED = "/dev/shm"
ROOM = "give the container more (docker run --shm-size 2g, or --ipc host)"
MOST_FILES = 65_536
FILES, SPARE_FILES = 3, 24
"""Files that each worker keeps open in the main process (two ends of a pipe, and one that tells when it ends), and files that
anything else may open at the same time.
"""
PREFETCH = 3
"""Number of batches that a worker makes before they are needed."""

POLICIES = {"cifar10": v2.AutoAugmentPolicy.CIFAR10, "imagenet": v2.AutoAugmentPolicy.IMAGENET}


class Batches(Dataset["Decoded | UserError"]):
    """Makes the batch of a spec. With --crop pad, images are made as for testing, and the device pads and crops them."""

    def __init__(self, images: Images, geometry: Geometry, mirror: bool, auto_augment: str) -> None:
        """Take the images, how they are cropped, and the augmentation that the workers apply."""
        self.images, self.geometry = images, geometry
        cropped = geometry.crop != "pad"
        self.mirror = mirror and cropped
        self.policy = v2.AutoAugment(POLICIES[auto_augment]) if auto_augment != "none" and cropped else None

    def __getitem__(self, spec: Spec) -> "Decoded | UserError":
        """Return the batch of ``spec``, with images (B, S, S, 3) uint8; a worker process returns it in shared memory.

        A UserError is returned, not raised: torch would add the traceback of the worker to what it raises in the main process.
        """
        try:
            decoded = self._decode(spec)
            if get_worker_info() is not None:
                # Done here because the thread of the queue could not tell the main process that memory has run out.
                decoded.images.share_memory_()
                decoded.ids.share_memory_()
            return decoded
        except UserError as error:
            return error
        except RuntimeError as error:
            if "Too many open files" in str(error):
                return too_many_open_files()
            if "shared memory" not in str(error):
                raise
            return UserError(f"The shared memory in {SHARED} is full: {ROOM}, or lower --workers or --batch-size.")

    def _decode(self, spec: Spec) -> Decoded:
        size = self.geometry.size

        def attempt(place: int, row: int) -> Tensor:
            return self._make_sample(read_encoded(self.images, row), None if spec.draws is None else spec.draws[place])

        samples, ids, bad = make_samples(spec, attempt)
        out = torch.empty(len(samples), size, size, 3, dtype=torch.uint8)
        for place, sample in enumerate(samples):
            out[place] = sample.permute(1, 2, 0)
        return Decoded(out, torch.from_numpy(ids), bad)

    def _make_sample(self, data: bytes, draws: Draws | None) -> Tensor:
        """Decode, crop and augment one image, to (3, S, S) uint8."""
        image = decode(data)
        if draws is None or self.geometry.crop == "pad":
            return resize_for_testing(image, self.geometry)
        left, top, right, bottom = self.geometry.train_box(image.shape[-1], image.shape[-2], draws)
        image = resize_to_square(image[:, top:bottom, left:right], self.geometry.size)
        if self.mirror and draws[MIRROR] < 0.5:
            image = image.flip(-1)
        if self.policy is not None:
            # torchvision draws from the global generator. The seed is that of the sample, so a resumed run draws the same.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(draws.view(np.uint64)[MIRROR] >> np.uint64(1)))
                image = self.policy(image)
        return image


def decode(data: bytes) -> Tensor:
    """Decode any image to (3, H, W) uint8: plain JPEGs with torchvision, which is faster, all others with Pillow.

    Raises:
        Unreadable: as in :func:`fastadvisor.loading.decode.decode_rgb`.
    """
    if decode_image is not None and plain_jpeg_size(data) is not None:
        try:
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:  # Pillow may read the damaged file all the same, or name the damage
            pass
    return torch.from_numpy(np.array(decode_rgb(data))).permute(2, 0, 1)


class TorchBackend:
    """Makes batches in worker processes or, with ``workers`` 0, in this process."""

    def __init__(self, batches: Batches, workers: int, pin_memory: bool) -> None:
        """Take what makes a batch, the number of processes, and whether to make batches in pinned memory, for a GPU."""
        self.batches, self.workers, self.pin_memory = batches, workers, pin_memory

    def decode(self, specs: Iterable[Spec]) -> Iterator[Decoded]:
        """Yield the batches of ``specs``; the workers live as long as this iterator."""
        loader: DataLoader[Decoded | UserError] = DataLoader(
            self.batches,
            sampler=specs,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            prefetch_factor=PREFETCH if self.workers else None,
            collate_fn=_return_batch,
            worker_init_fn=_set_up_worker,
            generator=torch.Generator(),  # without it, seeds would be drawn from the global one, which would change the run
        )
        if self.workers and "nvidia.dali" in sys.modules:
            # A dead DALI pipeline that a worker came to collect would wait there for its threads, which a fork leaves behind.
            gc.collect()
        try:
            for decoded in loader:
                if isinstance(decoded, UserError):
                    raise decoded
                yield decoded
        except RuntimeError as error:
            if "Too many open files" in str(error) or "ancdata" in str(error):
                raise too_many_open_files() from None
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: a batch depends on its spec alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""

    def close(self) -> None:
        """Do nothing: the workers end with the iterator of ``decode``."""


def check_shared_memory(batches: Sequence[int], tests: Sequence[int], side: int, workers: int) -> None:
    """Check that the batches that worker processes keep ready fit in shared memory; if it ran out, workers would be killed.

    Args:
        batches: batch size of each training loader; these run at the same time.
        tests: batch size of each loader for testing; these run one at a time, beside the training loaders.
        side: side of the images in pixels.
        workers: number of worker processes of each loader.

    Raises:
        UserError: the batches do not fit; the message says how many workers would.
    """
    if not os.path.isdir(SHARED):
        return
    status = os.statvfs(SHARED)
    free = status.f_bavail * status.f_frsize // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    image = 3 * side * side
    each = image * (sum(batches) + max(tests, default=0))  # bytes of one batch of every loader
    if (workers * PREFETCH + 1) * each <= free:
        return
    fits = max(0, (free // each - 1) // PREFETCH)
    way = f"take --workers {fits}, which fits" if fits else "take --workers 0, which needs none"
    raise UserError(
        f"The {workers} worker processes of each loader hand over batches in {SHARED}, which has {free / 1e6:.0f} MB free, and "
        f"need {(workers * PREFETCH + 1) * each / 1e6:.0f}: {ROOM}, or {way}."
    )


def check_open_files(loaders: int, workers: int) -> None:
    """Raise the limit of open files of this process, and check that it is enough for the worker processes.

    Raises:
        UserError: it is not enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if os.path.isdir("/proc/self/fd") and soft != resource.RLIM_INFINITY:
        free = soft - len(os.listdir("/proc/self/fd"))
        if loaders * workers * FILES + SPARE_FILES > free:
            raise too_many_open_files()


def _return_batch(batch: Any) -> Any:
    return batch


def _end_worker(error: Exception, batch: object) -> None:
    """End the worker when it cannot hand over a batch: the main process would wait for that batch forever."""
    os._exit(1)


def _set_up_worker(worker: int) -> None:
    """Set up a worker process: its memory, what it does if a batch cannot be handed over, and its signals.

    A worker holds one batch at a time, so unlike a training step it gains nothing from keeping freed memory. Signals that are
    sent to all processes of a run, as by Ctrl-C, are left to the main process, which ends the workers itself.
    """
    return_freed_memory()
    setattr(queues.Queue, "_on_queue_feeder_error", staticmethod(_end_worker))  # noqa: B010 (not typed)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
