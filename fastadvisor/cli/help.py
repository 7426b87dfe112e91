"""The pages that ``--help`` and ``--help-all`` print."""

import shutil
import textwrap
import types
from collections.abc import Mapping, Sequence
from typing import Any

from fastadvisor import recipes
from fastadvisor.config import PATHS, Setting, registered_methods

WIDTH = 80
"""Columns of a page, on a wider terminal too."""
COLUMN = 26
"""Where the texts begin."""
HARD = "\u00a0"
"""A space at which no line ends."""


def format_help(
    command: str, description: str, settings: Sequence[Setting], defaults: Mapping[str, Any], *, essentials: bool
) -> str:
    """Return a command's help: its flags under titles, with their defaults.

    Args:
        command: its name, as "train".
        description: a sentence.
        settings: its flags, in order.
        defaults: by name, the values without any flags.
        essentials: only the settings that everybody needs.
    """
    width = max(66, min(WIDTH, shutil.get_terminal_size().columns))
    shown = [setting for setting in settings if setting.essential or not essentials]
    about = [description]
    if essentials:
        about.append(f"The essential flags; 'fastadvisor {command} --help-all' lists all {len(settings)}.")
    about.append(
        f"Defaults are for --dataset{HARD}{defaults['dataset']}. Every switch has two forms, such as --amp and --no-amp."
    )
    blocks = [f"usage: fastadvisor {command} [--config RECIPE|FILE] [flags]", _wrapped(" ".join(about), width)]
    for title in dict.fromkeys(map(_title, shown)):
        entries = [_entry(setting, defaults[setting.name], width) for setting in shown if _title(setting) == title]
        blocks.append("\n".join([*textwrap.wrap(title, width), *entries]))
    listed = ", ".join(recipes.names())
    text = f"Take settings from a recipe or a YAML file; flags override them. Recipes (see 'fastadvisor recipes'): {listed}."
    blocks.append("\n".join(["Settings from a file", _columns("--config RECIPE|FILE", text, width)]))
    return "\n\n".join(blocks)


def _title(setting: Setting) -> str:
    """Return what a setting is listed under, with the methods that use it."""
    own = setting.title.startswith("Method ")
    return setting.title if own or setting.methods is None else f"{setting.title} ({', '.join(setting.methods)})"


def _entry(setting: Setting, default: Any, width: int) -> str:
    choices = [one for one in setting.choices if one != "auto" or not _is_optional_switch(setting)]
    unnamed = [one for one in choices if f"{one}:" not in setting.help]
    one_of = f" One of {', '.join(choices)}." if choices and unnamed and not _is_optional_switch(setting) else ""
    named = setting.help.replace(",", " ").replace(".", " ").split()
    others = [name for name in registered_methods() if name not in named] if setting.name == "method" else []
    if others:  # registered by other packages
        one_of = f" Others: {', '.join(others)}."
    text = f"{setting.help}{one_of} (default:{HARD}{_shown(default)})"
    return _columns(_written(setting, default), text, width)


def _written(setting: Setting, default: Any) -> str:
    """Return the flag as it is typed, with what follows it; that of a switch is the one which makes a difference."""
    if setting.is_switch:
        return f"--no-{setting.flag[2:]}" if default else setting.flag
    if _is_optional_switch(setting):
        return f"{setting.flag} [{'|'.join(setting.choices)}]"
    plain = [one for one in setting.alternatives if one is not types.NoneType]
    value = "PATH" if setting.name in PATHS else "NAME" if setting.choices else {int: "N", float: "X"}.get(plain[0], "NAME")
    return f"{setting.flag} VALUE ..." if setting.is_list else f"{setting.flag} {value}"


def _is_optional_switch(setting: Setting) -> bool:
    return bool in setting.alternatives and not setting.is_switch


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return HARD.join(map(_shown, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _columns(left: str, text: str, width: int) -> str:
    """Return ``left`` at the margin and ``text`` beside it, or below it where ``left`` is too long."""
    lines = _wrapped(text, width - COLUMN).splitlines()
    first = f"  {left}"
    beside = len(first) + 2 <= COLUMN
    body = [" " * COLUMN + line for line in (lines[1:] if beside else lines)]
    return "\n".join([f"{first.ljust(COLUMN)}{lines[0]}" if beside else first, *body])


def _wrapped(text: str, width: int) -> str:
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(HARD, " ")
