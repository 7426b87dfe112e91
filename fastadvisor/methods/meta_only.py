"""Cross-entropy on the meta-set alone: the floor that a method using the meta-set must beat."""

from fastadvisor.methods.base import Method
from fastadvisor.methods.stages import Stage


class MetaOnly(Method):
    """As many steps as the others take, all of them on the clean images."""

    def stages(self) -> tuple[Stage, ...]:
        """Return one stage, on the meta-set."""
        return (Stage("meta"),)
