"""torch's DataLoader: a worker process makes a whole batch, with torchvision's decoder and transforms."""

import os
import resource
import signal
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
except ImportError:  # torchvision announces that a later release will be without it
    decode_image = None

SHARED = "/dev/shm"
ROOM = "give the container more (docker run --shm-size 2g, or --ipc host)"
MOST_FILES = 65_536
FILES, SPARE_FILES = 3, 24
"""Files that a worker keeps open in the main process (a pipe's two ends, and what tells of its end), and all else that may be
opened at a time.
"""
PREFETCH = 3
"""Batches a worker may be ahead."""

POLICIES = {"cifar10": v2.AutoAugmentPolicy.CIFAR10, "imagenet": v2.AutoAugmentPolicy.IMAGENET}


class Batches(Dataset["Decoded | UserError"]):
    """Makes the batch of a spec. With --crop pad the images are as in testing: the device pads and crops them."""

    def __init__(self, images: Images, geometry: Geometry, mirror: bool, auto_augment: str) -> None:
        """Take where the images are, how they are cropped, and the augmentation that is the workers' to do."""
        self.images, self.geometry = images, geometry
        cropped = geometry.crop != "pad"
        self.mirror = mirror and cropped
        self.policy = v2.AutoAugment(POLICIES[auto_augment]) if auto_augment != "none" and cropped else None

    def __getitem__(self, spec: Spec) -> "Decoded | UserError":
        """Return the batch of ``spec``, images (B, S, S, 3) uint8; from a worker process, in shared memory.

        What a user can put right is returned: torch would add the worker's traceback to what it raises in the main process.
        """
        try:
            decoded = self._decode(spec)
            if get_worker_info() is not None:
                # Here, not by the queue's own thread, which cannot tell the main process of memory that has run out.
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
        """Return (3, S, S) uint8."""
        image = decode(data)
        if draws is None or self.geometry.crop == "pad":
            return resize_for_testing(image, self.geometry)
        left, top, right, bottom = self.geometry.train_box(image.shape[-1], image.shape[-2], draws)
        image = resize_to_square(image[:, top:bottom, left:right], self.geometry.size)
        if self.mirror and draws[MIRROR] < 0.5:
            image = image.flip(-1)
        if self.policy is not None:
            # torchvision draws from the global generator; the seed is the sample's own, so that a resumed run draws the same.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(draws.view(np.uint64)[MIRROR] >> np.uint64(1)))
                image = self.policy(image)
        return image


def decode(data: bytes) -> Tensor:
    """Return any image as (3, H, W) uint8: plain JPEGs by torchvision, which is quicker, the rest by Pillow.

    Raises:
        Unreadable: as :func:`fastadvisor.loading.decode.decode_rgb`.
    """
    if decode_image is not None and plain_jpeg_size(data) is not None:
        try:
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:  # damaged in a way that Pillow may forgive, or name
            pass
    return torch.from_numpy(np.array(decode_rgb(data))).permute(2, 0, 1)


class TorchBackend:
    """Batches from worker processes, or without any (``workers`` 0) from this one."""

    def __init__(self, batches: Batches, workers: int, pin_memory: bool) -> None:
        """Take what makes a batch, the number of processes, and whether batches are bound for a GPU."""
        self.batches, self.workers, self.pin_memory = batches, workers, pin_memory

    def decode(self, specs: Iterable[Spec]) -> Iterator[Decoded]:
        """Return the batches of ``specs``; the workers live as long as this iterator."""
        loader: DataLoader[Decoded | UserError] = DataLoader(
            self.batches,
            sampler=specs,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            prefetch_factor=PREFETCH if self.workers else None,
            collate_fn=_return_batch,
            worker_init_fn=_set_up_worker,
            generator=torch.Generator(),  # seeds the workers, else from the global one: the run's other numbers would move
        )
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
        """Return nothing: a batch depends on its spec alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""

    def close(self) -> None:
        """There is nothing to end: the workers go with the iterator."""


def check_shared_memory(batches: Sequence[int], tests: Sequence[int], side: int, workers: int) -> None:
    """Find out whether the batches that worker processes keep ready fit in shared memory: where it runs out, they end one by
    one.

    Args:
        batches: images in a batch of each training loader, which all run at a time.
        tests: of each loader to test with, which run one at a time beside them.
        side: of the images in pixels.
        workers: of each loader.

    Raises:
        UserError: they do not; names how many workers do.
    """
    if not os.path.isdir(SHARED):
        return
    status = os.statvfs(SHARED)
    free = status.f_bavail * status.f_frsize // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    image = 3 * side * side
    each = image * (sum(batches) + max(tests, default=0))  # that all loaders hold for one batch each
    if (workers * PREFETCH + 1) * each <= free:
        return
    fits = max(0, (free // each - 1) // PREFETCH)
    way = f"take --workers {fits}, which fits" if fits else "take --workers 0, which needs none"
    raise UserError(
        f"The {workers} worker processes of each loader hand over batches in {SHARED}, which has {free / 1e6:.0f} MB free, and "
        f"need {(workers * PREFETCH + 1) * each / 1e6:.0f}: {ROOM}, or {way}."
    )


def check_open_files(loaders: int, workers: int) -> None:
    """Let this process open as many files as it may, and find out whether that is enough for the worker processes.

    Raises:
        UserError: it is not.
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
    """End the worker: what it cannot hand over is lost, and the main process would wait for it without end."""
    os._exit(1)


def _set_up_worker(worker: int) -> None:
    """A worker holds one batch; it has no use for the heap that a training step wants kept. Signals sent to all processes of a
    run, as by Ctrl-C, are for the run to answer: it ends its workers itself.
    """
    return_freed_memory()
    setattr(queues.Queue, "_on_queue_feeder_error", staticmethod(_end_worker))  # noqa: B010 (not typed)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
