"""The same random batch over and over: training without loading, the upper bound that other loaders are compared with."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fastadvisor.loading.backends.stream import Decoded
from fastadvisor.loading.order import Spec


class SyntheticBackend:
    """Batches of normal noise on the device; the ids, and so the labels, are real."""

    def __init__(self, batch_size: int, size: int, device: torch.device) -> None:
        """Make (``batch_size``, 3, ``size``, ``size``) float32 on ``device``."""
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(batch_size, 3, size, size, generator=generator).to(device)

    def decode(self, specs: Iterable[Spec]) -> Iterator[Decoded]:
        """Yield the same images for each of ``specs``."""
        for spec in specs:
            yield Decoded(self.images[: len(spec.ids)], torch.from_numpy(spec.ids), {})

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: there is no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""

    def close(self) -> None:
        """Do nothing: there are no threads or processes."""
