"""NVIDIA DALI: it decodes, crops, resizes, mirrors and normalises on the GPU; on the CPU it only decodes and crops, in threads.

Python reads the files, in threads of its own, and gives DALI the encoded bytes together with the window to crop. The order,
the crops and the sample ids are therefore the same as with every other loader, a run resumes by the number of a batch, and
bad files are found before they reach DALI, which would give up the whole batch.

On the CPU, resizing takes DALI ten times as long as torchvision, and twice as long as decoding (benchmarks.decoding). There,
torchvision resizes the images, in Python's threads.
"""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from queue import Empty, Full, Queue
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastadvisor.datasets.images import Images, encode_ppm
from fastadvisor.datasets.paths import Ints
from fastadvisor.loading.backends.dali_pipeline import PREFETCH, Work, build_pipeline
from fastadvisor.loading.backends.resize import resize_for_testing, resize_to_square
from fastadvisor.loading.backends.stream import Decoded, make_samples
from fastadvisor.loading.decode import decode_rgb, read_encoded
from fastadvisor.loading.geometry import MIRROR
from fastadvisor.loading.jpeg import plain_jpeg_size
from fastadvisor.loading.order import Spec

Encoded = NDArray[np.uint8]


def available() -> bool:
    """Return whether DALI is installed."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


class Sample(NamedTuple):
    """An image as it is given to DALI."""

    encoded: Encoded
    box: tuple[float, float, float, float]
    """The window to crop, (left, top, right, bottom) in source pixels."""


class Prepared(NamedTuple):
    """A batch whose files have been read."""

    spec: Spec
    samples: list[Sample]
    ids: Ints
    bad: dict[int, str]


class DaliBackend:
    """Makes the batches of one part of a data set, with a pipeline of its own."""

    def __init__(self, images: Images, work: Work) -> None:
        """Take the images and what to do with them; nothing runs before the first call of ``decode``."""
        self.images, self.work = images, work
        self._by_pillow: set[int] = set()
        """Rows of images that DALI has failed on, or may have failed on: Pillow decodes them from then on."""
        self._pipeline: Any = None
        self._reader: _Reader | None = None
        self._in_flight: deque[Prepared] = deque()
        self._empty: dict[int, str] = {}
        self._checkpoint: bytes | None = None
        """State of DALI's random numbers, which only AutoAugment draws, after the last batch that was handed out."""
        self._pool: ThreadPoolExecutor | None = None

    def decode(self, specs: Iterable[Spec]) -> Iterator[Decoded]:
        """Yield the batches of ``specs``, which are made before they are needed.

        Raises:
            RuntimeError: DALI fails for another reason than a file.
        """
        self.close()
        self._pool = ThreadPoolExecutor(max(2, self.work.threads), thread_name_prefix="fastadvisor-read")
        self._reader = _Reader(self._prepare, specs)
        self._pipeline = self._build()
        ready: deque[tuple[Callable[[], Tensor], Prepared]] = deque()
        more = True
        while more or ready:
            # On the CPU, one batch is resized while the one before it is trained on.
            while more and len(ready) <= int(self.work.only_decoded):
                try:
                    ready.append(self._run())
                except StopIteration:
                    more = False
            if ready:
                images, done = ready.popleft()
                yield Decoded(images(), torch.from_numpy(done.ids), done.bad)
            if self._empty:
                yield self._make_empty_batch()
        error = self._reader.error
        self.close()
        if error is not None:
            raise error

    def _make_empty_batch(self) -> Decoded:
        """Return an empty batch, with the bad images of the test batches of which nothing could be read."""
        size, bad, self._empty = self.work.geometry.size, self._empty, {}
        return Decoded(torch.empty(0, 3, size, size), torch.empty(0, dtype=torch.int64), bad)

    def _run(self) -> tuple[Callable[[], Tensor], Prepared]:
        """Return a function that waits for the next images, and their batch; raise StopIteration after the last."""
        while True:
            try:
                if self.work.device.type == "cuda":
                    outputs = self._pipeline.run(torch.cuda.current_stream(self.work.device))
                else:
                    outputs = self._pipeline.run()
                done = self._in_flight.popleft()
                if self.work.augmented:
                    self._checkpoint = self._pipeline.checkpoint()
                if self.work.only_decoded:
                    return self._resize(outputs[0], done), done
                # The dynamic executor gives its buffer away: nothing is copied, and DALI never writes to it again.
                return partial(from_dlpack, outputs[0].as_tensor()), done
            except RuntimeError as error:
                self._recover(error)

    def _resize(self, decoded: Any, batch: Prepared) -> Callable[[], Tensor]:
        """Start to resize what DALI has decoded; return a function that waits for the images, (B, S, S, 3) uint8."""
        assert self._pool is not None
        geometry, count = self.work.geometry, len(batch.samples)
        out = np.empty((count, geometry.size, geometry.size, 3), dtype=np.uint8)
        mirror = self._choose_mirrored(batch)

        def resize(places: Ints) -> None:
            for place in places.tolist():
                image = torch.from_numpy(np.asarray(decoded[place])).permute(2, 0, 1)
                image = resize_to_square(image, geometry.size) if self.work.cropped else resize_for_testing(image, geometry)
                # With numpy, as torch would start threads of its own for a copy of this size.
                pixels = image.permute(1, 2, 0).numpy()
                out[place] = pixels[:, ::-1] if mirror[place] else pixels

        parts = np.array_split(np.arange(count), max(2, self.work.threads))
        begun = [self._pool.submit(resize, part) for part in parts]

        def wait() -> Tensor:
            for part in begun:
                part.result()
            return torch.from_numpy(out)

        return wait

    def _choose_mirrored(self, batch: Prepared) -> NDArray[np.int32]:
        """Return (B,) int32: 1 for the images of a batch that are mirrored, 0 for the others."""
        if not (self.work.cropped and self.work.mirror) or batch.spec.draws is None:
            return np.zeros(len(batch.samples), dtype=np.int32)
        return (batch.spec.draws[: len(batch.samples), MIRROR] < 0.5).astype(np.int32)

    def _recover(self, error: RuntimeError) -> None:
        """After DALI has failed, have Pillow decode all batches that were under way, and start again with the first of them.

        Raises:
            RuntimeError: Pillow has decoded all of them already, so no file is the cause.
        """
        assert self._reader is not None
        under_way = list(self._in_flight)
        suspects = {int(row) for prepared in under_way for row in prepared.ids}
        if suspects <= self._by_pillow:
            raise error
        self._by_pillow |= suspects
        self._in_flight.clear()
        self._reader.put_back([self._prepare(prepared.spec) for prepared in under_way])
        self._pipeline = self._build()

    def _prepare(self, spec: Spec) -> Prepared:
        """Read the files of a batch."""

        def attempt(place: int, row: int) -> Sample:
            data = read_encoded(self.images, row)
            size = None if row in self._by_pillow else plain_jpeg_size(data)
            if size is None:
                pixels = np.asarray(decode_rgb(data))
                data, size = encode_ppm(pixels), (pixels.shape[1], pixels.shape[0])
            encoded = np.frombuffer(data, dtype=np.uint8)
            if spec.draws is None or not self.work.cropped:
                return Sample(encoded, self.work.geometry.test_box(*size))
            return Sample(encoded, self.work.geometry.train_box(*size, spec.draws[place]))

        return Prepared(spec, *make_samples(spec, attempt, self._map_in_threads))

    def _map_in_threads(self, function: Callable[[int], Any], places: Iterable[int]) -> list[Any]:
        """Do what ``map`` does, in a few long tasks: a task for each sample would cost more than reading it."""
        assert self._pool is not None
        parts = np.array_split(np.fromiter(places, dtype=np.int64), max(2, self.work.threads))
        done = self._pool.map(lambda part: [function(place) for place in part.tolist()], parts)
        return [one for part in done for one in part]

    def _feed(self) -> tuple[Any, ...]:
        """Return the next batch as DALI wants it; DALI calls this whenever it has room, and stops at StopIteration."""
        assert self._reader is not None
        prepared = self._reader.get()
        while not prepared.samples:  # DALI takes no empty batch
            self._empty.update(prepared.bad)
            if self.work.training:
                raise StopIteration  # the batches that follow may be no better, without end
            prepared = self._reader.get()
        self._in_flight.append(prepared)
        box = np.array([sample.box for sample in prepared.samples], dtype=np.float32)
        start, end = box[:, 1::-1], box[:, :1:-1]  # DALI counts (vertical, horizontal)
        encoded = [sample.encoded for sample in prepared.samples]
        if not self.work.cropped:
            return encoded, np.ascontiguousarray(start), np.ascontiguousarray(end)
        return encoded, start.astype(np.int32), (end - start).astype(np.int32), self._choose_mirrored(prepared)

    def _build(self) -> Any:
        # DALI warns that its own AutoAugment uses old names, and sets the filter itself, so the warning is recorded instead.
        with warnings.catch_warnings(record=True):
            pipeline = build_pipeline(self.work, self._feed, self._checkpoint)
            pipeline.build()
        return pipeline

    def state_dict(self) -> dict[str, Any]:
        """Return the state of DALI's random numbers."""
        state = b"" if self._checkpoint is None else self._checkpoint
        return {"checkpoint": torch.frombuffer(bytearray(state), dtype=torch.uint8) if state else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of DALI's random numbers."""
        self.close()
        saved = state["checkpoint"]
        self._checkpoint = None if saved is None else bytes(saved.numpy().tobytes())

    def close(self) -> None:
        """Stop reading, and free the pipeline."""
        if self._reader is not None:
            self._reader.stop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader = self._pool = self._pipeline = None
        self._in_flight.clear()


@dataclass
class _Reader:
    """A thread that reads batches before they are needed."""

    prepare: Callable[[Spec], Prepared]
    specs: Iterable[Spec]
    error: BaseException | None = None
    _queue: "Queue[Prepared | None]" = field(default_factory=lambda: Queue(PREFETCH))
    _returned: deque[Prepared] = field(default_factory=deque)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, name="fastadvisor-reader", daemon=True)
        self._thread.start()

    def get(self) -> Prepared:
        """Return the next batch; raise StopIteration after the last one, or if the thread has failed."""
        if self._returned:
            return self._returned.popleft()
        while True:
            try:
                prepared = self._queue.get(timeout=1)
            except Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise StopIteration from None
                continue
            if prepared is None:
                self._queue.put(None)  # for the next call
                raise StopIteration
            return prepared

    def put_back(self, batches: Iterable[Prepared]) -> None:
        """Have ``get`` return ``batches`` first."""
        self._returned.extendleft(reversed(list(batches)))

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            for spec in self.specs:
                if not self._put(self.prepare(spec)):
                    return
        except BaseException as error:  # handed to the training thread
            self.error = error
        self._put(None)

    def _put(self, prepared: Prepared | None) -> bool:
        """Put a batch into the queue; return False if the reader is being stopped."""
        while not self._stopped.is_set():
            try:
                self._queue.put(prepared, timeout=0.1)
                return True
            except Full:
                continue
        return False
