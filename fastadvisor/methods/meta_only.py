"""Cross-entropy on the meta-set alone: a floor that every method that uses the meta-set must beat."""

from fastadvisor.methods.base import Method
from fastadvisor.methods.stages import Stage


class MetaOnly(Method):
    """Cross-entropy; as many steps as with any other method, but all of them on the meta-set."""

    def stages(self) -> tuple[Stage, ...]:
        """Return one stage, on the meta-set."""
        return (Stage("meta"),)
