"""NVIDIA DALI: decode, crop, resize, mirror and normalise on the GPU; on the CPU decode and crop, in its threads.

Python reads the files, in threads of its own, and hands DALI the encoded bytes with the window to cut out. So the order,
the crops and the sample ids are those of every other loader, a run resumes by a batch's number, and a bad file is found
before DALI, which would give up the whole batch, sees it.

On the CPU DALI's resizing takes ten times as long as torchvision's, twice its decoding (benchmarks.decoding), so there
torchvision does it, in Python's threads.
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
    """An image as DALI gets it."""

    encoded: Encoded
    box: tuple[float, float, float, float]
    """(left, top, right, bottom) in pixels."""


class Prepared(NamedTuple):
    """A batch that has been read."""

    spec: Spec
    samples: list[Sample]
    ids: Ints
    bad: dict[int, str]


class DaliBackend:
    """Batches of one part of a data set; each part has its own pipelines, cycling on their own."""

    def __init__(self, images: Images, work: Work) -> None:
        """Take where the images are and what to do with them; nothing runs before the first ``decode``."""
        self.images, self.work = images, work
        self._by_pillow: set[int] = set()
        """Images that DALI has failed on, or may have: Pillow decodes them from then on."""
        self._pipeline: Any = None
        self._reader: _Reader | None = None
        self._in_flight: deque[Prepared] = deque()
        self._empty: dict[int, str] = {}
        self._checkpoint: bytes | None = None
        """Of DALI's random numbers, which only AutoAugment draws, after the last batch that was handed out."""
        self._pool: ThreadPoolExecutor | None = None

    def decode(self, specs: Iterable[Spec]) -> Iterator[Decoded]:
        """Return the batches of ``specs``, made ahead of their use.

        Raises:
            RuntimeError: DALI fails, and not because of a file.
        """
        self.close()
        self._pool = ThreadPoolExecutor(max(2, self.work.threads), thread_name_prefix="fastadvisor-read")
        self._reader = _Reader(self._prepare, specs)
        self._pipeline = self._build()
        ready: deque[tuple[Callable[[], Tensor], Prepared]] = deque()
        more = True
        while more or ready:
            # One batch is being resized while the one before it is trained on.
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
        """Return the bad images of test batches of which nothing could be read."""
        size, bad, self._empty = self.work.geometry.size, self._empty, {}
        return Decoded(torch.empty(0, 3, size, size), torch.empty(0, dtype=torch.int64), bad)

    def _run(self) -> tuple[Callable[[], Tensor], Prepared]:
        """Return the next batch, its images as a function that waits for them; StopIteration after the last."""
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
                # DALI's dynamic executor gives the buffer away with the tensor: no copy, and it is never written again.
                return partial(from_dlpack, outputs[0].as_tensor()), done
            except RuntimeError as error:
                self._recover(error)

    def _resize(self, decoded: Any, batch: Prepared) -> Callable[[], Tensor]:
        """Begin to resize what DALI has decoded; return a function that waits for (B, S, S, 3) uint8."""
        assert self._pool is not None
        geometry, count = self.work.geometry, len(batch.samples)
        out = np.empty((count, geometry.size, geometry.size, 3), dtype=np.uint8)
        mirror = self._choose_mirrored(batch)

        def resize(places: Ints) -> None:
            for place in places.tolist():
                image = torch.from_numpy(np.asarray(decoded[place])).permute(2, 0, 1)
                image = resize_to_square(image, geometry.size) if self.work.cropped else resize_for_testing(image, geometry)
                # By numpy: torch would use threads of its own for a copy of this size.
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
        """Return 1 for the images of a batch that are to be mirrored."""
        if not (self.work.cropped and self.work.mirror) or batch.spec.draws is None:
            return np.zeros(len(batch.samples), dtype=np.int32)
        return (batch.spec.draws[: len(batch.samples), MIRROR] < 0.5).astype(np.int32)

    def _recover(self, error: RuntimeError) -> None:
        """DALI has given up: have Pillow decode all that was under way, and begin again with the first of it."""
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
        """Read a batch."""

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
        """``map`` with a few long tasks: one a sample would cost more than reading it."""
        assert self._pool is not None
        parts = np.array_split(np.fromiter(places, dtype=np.int64), max(2, self.work.threads))
        done = self._pool.map(lambda part: [function(place) for place in part.tolist()], parts)
        return [one for part in done for one in part]

    def _feed(self) -> tuple[Any, ...]:
        """Return what DALI asks for; it calls this as often as it has room, and stops at StopIteration."""
        assert self._reader is not None
        prepared = self._reader.get()
        while not prepared.samples:  # DALI takes no empty batch
            self._empty.update(prepared.bad)
            if self.work.training:
                raise StopIteration  # the next may be no better, without end
            prepared = self._reader.get()
        self._in_flight.append(prepared)
        box = np.array([sample.box for sample in prepared.samples], dtype=np.float32)
        start, end = box[:, 1::-1], box[:, :1:-1]  # DALI counts (vertical, horizontal)
        encoded = [sample.encoded for sample in prepared.samples]
        if not self.work.cropped:
            return encoded, np.ascontiguousarray(start), np.ascontiguousarray(end)
        return encoded, start.astype(np.int32), (end - start).astype(np.int32), self._choose_mirrored(prepared)

    def _build(self) -> Any:
        # Recorded, not filtered: DALI sets the filter itself while it warns that its AutoAugment uses its old names.
        with warnings.catch_warnings(record=True):
            pipeline = build_pipeline(self.work, self._feed, self._checkpoint)
            pipeline.build()
        return pipeline

    def state_dict(self) -> dict[str, Any]:
        """Return the state of DALI's random numbers."""
        state = b"" if self._checkpoint is None else self._checkpoint
        return {"checkpoint": torch.frombuffer(bytearray(state), dtype=torch.uint8) if state else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of DALI's random numbers."""
        self.close()
        saved = state["checkpoint"]
        self._checkpoint = None if saved is None else bytes(saved.numpy().tobytes())

    def close(self) -> None:
        """Stop reading and let the pipeline go."""
        if self._reader is not None:
            self._reader.stop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader = self._pool = self._pipeline = None
        self._in_flight.clear()


@dataclass
class _Reader:
    """A thread that prepares batches ahead."""

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
        """Return the next batch; StopIteration after the last, or when the thread has failed."""
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
                self._queue.put(None)  # for the next who asks
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
        """Return False when the reader is to stop."""
        while not self._stopped.is_set():
            try:
                self._queue.put(prepared, timeout=0.1)
                return True
            except Full:
                continue
        return False
