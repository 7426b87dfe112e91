"""A configuration from its layers, of which later ones win.

They are the defaults, the data set's recipe (``recipes/<dataset>.yaml``), the file or recipe named by ``config``, and flags or
keywords.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from fastadvisor import recipes
from fastadvisor.config.catalogue import list_settings
from fastadvisor.config.data import DataConfig
from fastadvisor.config.near_misses import answer_near_miss
from fastadvisor.config.paths import PATHS, expand_user, move_lists
from fastadvisor.config.registry import add_method_settings
from fastadvisor.config.settings import Config
from fastadvisor.errors import UserError, suggest

C = TypeVar("C", bound=Config)


class UnknownSetting(UserError):
    """A name that is none of a setting: of none that has been declared so far.

    Args:
        message: for the user.
        name: with underscores.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def read_layer(named: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one YAML layer: a recipe by name (``cifar-flip``) or a file by path.

    Raises:
        UserError: no such recipe or file, or not a mapping of keys to values.
    """
    name = expand_user(named)
    if name in recipes.names():
        text = recipes.read(name)
    elif os.path.isfile(name):  # Path.is_file raises on a name that is too long
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name} cannot be read as text ({error}); --config takes a recipe or a YAML file.") from None
    else:
        raise UserError(f"No recipe or file {name!r}.{suggest(name, recipes.names())} Recipes: {', '.join(recipes.names())}.")
    try:
        layer = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    # ValueError: something like a date with a 13th month.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name} is not readable as YAML: {' '.join(str(error).split())}.") from None
    if layer is None or node is None:  # an empty file
        return {}
    if not isinstance(layer, dict):
        raise UserError(f"{name} must hold lines of 'key: value', as in 'epochs: 30'.")
    keys = [key.value for key, _ in node.value]
    for key in layer:
        if keys.count(key) > 1:  # YAML would take the last one
            raise UserError(f"{name} sets {key} {keys.count(key)} times; keep one of the lines.")
    return layer


def resolve(kind: type[C], config: str | os.PathLike[str] | None = None, /, origin: str = "", **overrides: Any) -> C:
    """Build a configuration from its layers (see the module's docstring).

    Args:
        kind: ``Config``, ``CompareConfig`` or ``CheckConfig``.
        config: a recipe's name or a YAML file.
        origin: what ``overrides`` are called in messages.
        overrides: settings that win over the file.

    Raises:
        UserError: an unknown recipe or key (names the nearest one), or a value of the wrong type or out of range.
    """
    layer = read_layer(config) if config is not None else {}
    check_keys(kind, layer, f" in {config}")
    check_keys(kind, overrides, origin)
    layer = move_lists(layer, overrides.get("data_root"))
    dataset = overrides.get("dataset", layer.get("dataset", DataConfig.dataset))
    base = read_layer(dataset) if dataset in recipes.names() else {}
    below, origins = {**base, **add_implied(layer)}, dict.fromkeys(base, f" (from {dataset})")
    origins.update(dict.fromkeys(layer, f" (from {config})"))
    if layer:
        validate(kind, below, origins)  # a mistake in a file is one where a flag wins over it, too
    origins.update(dict.fromkeys(overrides, origin))
    return validate(kind, {**below, **add_implied(overrides)}, origins)


def build_config(kind: type[C], config: str | os.PathLike[str] | Config | None, settings: Mapping[str, Any]) -> C:
    """Return what ``config``, a recipe, a file or a whole configuration, and ``settings``, which win over it, come to.

    Raises:
        UserError: as :func:`resolve`.
    """
    if not isinstance(config, Config):
        return resolve(kind, config, **settings)
    check_keys(kind, settings, "")
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return validate(kind, {**values, **add_implied(settings)})


def add_implied(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``layer`` and what it implies for the layers below it.

    Where it turns noise off, or brings labels in its place, their rate of noise is undone. Where it gives the length of the run
    in epochs, their ``iterations``, which would win, are undone.
    """
    implied: dict[str, Any] = {}
    if layer.get("labels") is not None and "noise" not in layer:
        implied = {"noise": "none", "noise_rate": 0.0}
    elif layer.get("noise") == "none":
        implied = {"noise_rate": 0.0}
    if "epochs" in layer:
        implied["iterations"] = None
    return {**implied, **layer}


def check_keys(kind: type[Config], layer: Mapping[Any, Any], origin: str) -> None:
    """Raise a UserError that names the nearest key if ``layer`` holds one that ``kind`` does not have."""
    known = [field.name for field in fields(add_method_settings(kind))]
    for key in layer:
        if key in known:
            continue
        if (answer := answer_near_miss(str(key), known)) is not None:
            raise UserError(f"Unknown key {str(key)!r}{origin}: {answer}")
        name = str(key).replace("-", "_")
        message = f"Unknown key {str(key)!r}{origin}.{suggest(name, known)} 'fastadvisor train --help-all' lists them all."
        raise UnknownSetting(message, name)


def validate(kind: type[C], values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> C:
    """Return ``kind`` with ``values``, checked against the types and ranges that it declares.

    Args:
        kind: ``Config``, ``CompareConfig`` or ``CheckConfig``.
        values: by name; what is missing has its default.
        origins: by name, what follows a value in a message, as " (from mine.yaml)".

    Raises:
        UserError: the first value of the wrong type or out of range.
    """
    values = {
        key: expand_user(value) if key in PATHS and isinstance(value, str | os.PathLike) else value
        for key, value in values.items()
    }
    origins = origins or {}
    for setting in list_settings(kind).values():  # YAML takes the words on and off for True and False
        if isinstance(values.get(setting.name), bool) and {"on", "off"} <= set(setting.choices):
            values[setting.name] = "on" if values[setting.name] else "off"
    try:
        checked: C = _adapter(add_method_settings(kind)).validate_python(values)  # type: ignore[arg-type]  # as in registry.py
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(str(part) for part in first["loc"][:1]), first["msg"]
        reason = message[0].lower() + message[1:]
        allowed = re.findall(r"'(.*?)'", reason) if first["type"] == "literal_error" else []
        near = suggest(str(values.get(key)), allowed)
        raise UserError(f"{key} = {values.get(key)!r}{origins.get(key, '')}: {reason}.{near}") from None
    for key, value in values.items():
        if isinstance(value, bool) and not isinstance(getattr(checked, key), bool):  # YAML's yes and on would count as 1
            raise UserError(f"{key} = {value!r}{origins.get(key, '')}: input should be a number.")
    return checked


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain values that YAML and JSON take."""
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
