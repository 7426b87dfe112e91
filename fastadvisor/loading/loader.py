"""The interfaces of loaders, and all loaders of a run together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastadvisor.datasets.types import TrainingData
from fastadvisor.loading import unreadable
from fastadvisor.loading.batch import Batch
from fastadvisor.loading.samplers import Sampler
from fastadvisor.loading.unreadable import BadImages


class Loader(Protocol):
    """An endless stream of batches for training."""

    batch_size: int
    waited: float
    """Seconds spent waiting for batches so far."""

    def __len__(self) -> int:
        """Return the number of full batches in an epoch."""
        ...

    def next_batch(self) -> Batch:
        """Return the next batch."""
        ...

    def use(self, sampler: Sampler, *, anew: bool) -> None:
        """Draw epochs with ``sampler``.

        Args:
            sampler: decides which samples an epoch holds, and in what order.
            anew: whether the next batch begins a new epoch; otherwise ``sampler`` drew the epoch that is under way as well, as
                when a run is resumed.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, as a checkpoint holds it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where the loader stood whose ``state_dict`` returned ``state``."""
        ...

    def close(self) -> None:
        """End threads and processes."""
        ...


class EvaluationLoader(Protocol):
    """The test images, in batches; each image once in every pass."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None:
        """End threads and processes."""
        ...


@dataclass
class Loaders:
    """The loaders of a run."""

    name: str
    """resident, torch, dali or synthetic."""
    why: str
    """The reason for this loader, in words."""
    size: int
    """Side in pixels of the images in a batch."""
    data: TrainingData
    """The data that the loaders read; for a resident loader it is decoded, and images that cannot be read are left out."""
    train: Loader
    meta: Loader
    test: EvaluationLoader
    val: EvaluationLoader | None = None
    """The images by which the best checkpoint is chosen, if the data set has such images."""
    bad: list[BadImages] = field(default_factory=list)
    """The images that could not be read, for each of the training, meta, test and val images."""

    def bad_table(self) -> str:
        """Return a table of all images that could not be read, as CSV."""
        return unreadable.to_csv(self.bad)

    def bad_count(self) -> int:
        """Return the number of images that could not be read."""
        return sum(len(part.reasons) for part in self.bad)

    def close(self) -> None:
        """End threads and processes."""
        for loader in (self.train, self.meta, self.test, self.val):
            if loader is not None:
                loader.close()
