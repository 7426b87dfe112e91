"""Settings of the papers' experiments, one YAML file each; ``<dataset>.yaml`` holds a data set's own defaults."""

from importlib.resources import files


def names() -> list[str]:
    """Return the names of the recipes that come along, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files(__name__).iterdir() if entry.name.endswith(".yaml"))


def read(name: str) -> str:
    """Return the YAML text of the recipe ``name``."""
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
