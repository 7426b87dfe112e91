"""Cross-entropy on the meta-set alone: the floor that a method using the meta-set must beat."""

from fastadvisor.methods.base import Method, Phase


class MetaOnly(Method):
    """As many steps as the others take, all of them on the clean images."""

    def phases(self) -> list[Phase]:
        """Return one phase, on the meta-set."""
        return [Phase("meta")]
