"""Which method uses which settings, and configurations with the settings of all methods in them.

This is the ground floor: it knows no method. The methods register themselves, and what asks for a configuration by
:func:`fastadvisor.config.resolve` gets one that has their settings, too.
"""

import dataclasses
import functools
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_type_hints

S = TypeVar("S")

_SETTINGS: dict[str, tuple[type, ...]] = {}
"""By the name of the method."""


def register_method(name: str, settings: type) -> None:
    """Declare what settings a method uses, beside those that every run has.

    Args:
        name: of the method.
        settings: a dataclass, the method's ``Settings``. It may name shared ones that come along in a class variable ``USES``,
            as the settings of an advisor name ``MetaConfig``. A field that two methods have is one setting.

    Raises:
        TypeError: another method has a field of the same name and another type or default.
    """
    used = (settings, *getattr(settings, "USES", ()))
    for kind in used:
        for field, hint in _typed_fields(kind):
            for other, theirs in _of_methods().get(field.name, {}).items():
                if theirs != (repr(hint), _default(field)):
                    raise TypeError(f"The setting {field.name} of {name} has another type or default than that of {other}.")
    _SETTINGS[name] = used
    _completed.cache_clear()
    _of_methods.cache_clear()


def registered_methods() -> tuple[str, ...]:
    """Return the names of the methods that have registered, in that order."""
    return tuple(_SETTINGS)


def methods_that_use(setting: str) -> tuple[str, ...] | None:
    """Return the methods that use ``setting``; None if it is none of those that only some methods use."""
    return tuple(_of_methods().get(setting, {})) or None


def registered_settings() -> list[type]:
    """Return the dataclasses that methods have registered, each once."""
    return list(dict.fromkeys(kind for settings in _SETTINGS.values() for kind in settings))


def add_method_settings(kind: type[S]) -> type[S]:
    """Return the dataclass ``kind`` with the settings of all registered methods, as a subclass if it lacks any."""
    return _completed(kind)  # type: ignore[arg-type]  # it takes the class for one of its instances


@functools.cache
def _completed(kind: Any) -> Any:
    known = {field.name for field in fields(kind)}
    more: dict[str, tuple[str, Any, Any]] = {}
    for settings in registered_settings():
        for field, hint in _typed_fields(settings):
            if field.name not in known:
                more[field.name] = (field.name, hint, dataclasses.field(default=_default(field)))
    if not more:
        return kind
    return dataclasses.make_dataclass(
        kind.__name__, list(more.values()), bases=(kind,), namespace={"__doc__": kind.__doc__, "__module__": kind.__module__}
    )


def select_settings(kind: type[S], config: object) -> S:
    """Return the settings of ``config`` that the dataclass ``kind`` has, such as a method's ``Settings``."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(config, name) for name in names if hasattr(config, name)})


@functools.cache
def _of_methods() -> dict[str, dict[str, tuple[str, Any]]]:
    """By setting and method: type, in words, and default."""
    found: dict[str, dict[str, tuple[str, Any]]] = {}
    for method, settings in _SETTINGS.items():
        for kind in settings:
            for field, hint in _typed_fields(kind):
                found.setdefault(field.name, {})[method] = (repr(hint), _default(field))
    return found


def _typed_fields(kind: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return [(field, hints[field.name]) for field in fields(kind)]


def _default(field: Field[Any]) -> Any:
    assert field.default is not MISSING, f"The setting {field.name} needs a default that is no list, set or dict."
    return field.default
