"""Describes each setting: its flag, its place in ``--help``, and the conditions under which it is read."""

import ast
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fastadvisor.config.metadata import ESSENTIAL, Only
from fastadvisor.config.registry import add_method_settings, methods_that_use, registered_methods, registered_settings


@dataclass(frozen=True)
class Setting:
    """A setting of a command."""

    name: str
    alternatives: tuple[Any, ...]
    """Of its type: ``Count | None`` is (int, NoneType)."""
    owner: type
    """The component that declares it."""
    essential: bool
    conditions: tuple[Only, ...]
    """Conditions under which the setting is read; all must hold. See also :meth:`methods`."""

    @property
    def flag(self) -> str:
        """The flag, as it is written."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def is_switch(self) -> bool:
        """Whether the setting is a plain boolean, whose flag takes no value."""
        return self.alternatives == (bool,)

    @property
    def is_list(self) -> bool:
        """Whether its flag takes any number of values."""
        return any(get_origin(one) is tuple for one in self.alternatives)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, if the type is a ``Literal``."""
        return tuple(str(word) for one in self.alternatives if get_origin(one) is Literal for word in get_args(one))

    @property
    def methods(self) -> tuple[str, ...] | None:
        """The methods that use the setting; None if it does not depend on the method."""
        return methods_that_use(self.name)

    @property
    def title(self) -> str:
        """Title under which the help lists the setting."""
        title = vars(self.owner).get("TITLE")
        return str(title) if title is not None else f"Method {', '.join(self.methods or registered_methods())}"

    @property
    def help(self) -> str:
        """What it does: the string under its declaration, in one line; empty where there is no source to read it from."""
        return read_help_texts(self.owner).get(self.name, "")

    def from_text(self, text: str) -> Any:
        """Return what ``text``, as it stands on the command line, means: a number, None, or else the text itself."""
        if text == "None" and types.NoneType in self.alternatives:
            return None
        if bool in self.alternatives and text in ("True", "False"):
            return text == "True"
        kinds = [kind for one in self.alternatives for kind in (one, *get_args(one))]
        if {int, float} & {plain for kind in kinds for plain in alternatives(kind) if isinstance(plain, type)}:
            for number in (int, float):
                try:
                    return number(text)
                except ValueError:
                    continue
        return text


def list_settings(kind: type) -> dict[str, Setting]:
    """Return the settings of a configuration by name, in order; those of registered methods are among them."""
    return {field.name: _setting(field.name, add_method_settings(kind)) for field in fields(add_method_settings(kind))}


def _setting(name: str, kind: type) -> Setting:
    candidates = [*kind.__mro__, *(one for settings in registered_settings() for one in settings.__mro__)]
    declaring = [one for one in candidates if name in vars(one).get("__annotations__", {})]
    owner = next((one for one in declaring if not issubclass(one, kind)), declaring[0])
    hint = _hints(owner)[name]
    extras = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Only)]
    only = [vars(owner)["ONLY"]] if "ONLY" in vars(owner) else []
    essential = ESSENTIAL in getattr(hint, "__metadata__", ())
    return Setting(name, alternatives(hint), owner, essential, (*only, *extras))


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the plain types that ``hint`` stands for, without what restricts them."""
    if get_origin(hint) is Annotated:
        return alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(one for part in get_args(hint) for one in alternatives(part))
    return (hint,)


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


@functools.cache
def read_help_texts(kind: type) -> Mapping[str, str]:
    """Return the string under each field of the class ``kind``, in one line.

    They are read from the source, which an installed package and a zip have as well; without it there are none.
    """
    try:
        source = inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        return {}
    body: list[ast.stmt] = ast.parse(source).body
    for part in kind.__qualname__.split("."):
        found = next((one for one in body if isinstance(one, ast.ClassDef) and one.name == part), None)
        if found is None:
            return {}
        body = found.body
    texts = {}
    for declared, below in itertools.pairwise(body):
        match declared, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts
