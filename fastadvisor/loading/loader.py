"""What a loader is, and all of a run's loaders together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastadvisor.datasets.types import TrainingData
from fastadvisor.loading import unreadable
from fastadvisor.loading.batch import Batch
from fastadvisor.loading.samplers import Sampler
from fastadvisor.loading.unreadable import BadImages


class Loader(Protocol):
    """A stream of training batches."""

    batch_size: int
    waited: float
    """Seconds spent waiting for batches so far."""

    def __len__(self) -> int:
        """Full batches an epoch."""
        ...

    def next_batch(self) -> Batch:
        """Return the next batch."""
        ...

    def use(self, sampler: Sampler, *, anew: bool) -> None:
        """Draw epochs by ``sampler``; ``anew``: the next batch begins one, else the epoch that has begun was drawn by it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly there."""
        ...

    def close(self) -> None:
        """End threads and processes."""
        ...


class EvaluationLoader(Protocol):
    """The test images, each once a pass."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None:
        """End threads and processes."""
        ...


@dataclass
class Loaders:
    """What a run reads its batches from."""

    name: str
    """resident, torch, dali or synthetic."""
    why: str
    """Why this one."""
    size: int
    """Side in pixels of the images in a batch."""
    data: TrainingData
    """The data as the loaders see it: less the bad images that a resident loader found, and decoded for one."""
    train: Loader
    meta: Loader
    test: EvaluationLoader
    val: EvaluationLoader | None = None
    """To choose the best checkpoint by, where the data set has images for that."""
    bad: list[BadImages] = field(default_factory=list)
    """Of the training, meta, test and val images."""

    def bad_table(self) -> str:
        """Return all images that could not be read as CSV."""
        return unreadable.to_csv(self.bad)

    def bad_count(self) -> int:
        """Return how many images could not be read."""
        return sum(len(part.reasons) for part in self.bad)

    def close(self) -> None:
        """End threads and processes."""
        for loader in (self.train, self.meta, self.test, self.val):
            if loader is not None:
                loader.close()
