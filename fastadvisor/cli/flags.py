"""From the words after ``fastadvisor train`` to a configuration.

A flag is a field of ``config.Config``: ``--noise-rate 0.4``, ``--noise-rate=0.4`` or ``--noise_rate 0.4``; switches are
``--amp`` and ``--no-amp``; ``--milestones 0.8 0.9`` takes any number of values. Types and ranges are checked as those of a YAML
file are.
"""

import difflib
import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal, NoReturn, TypeVar

from fastadvisor import config
from fastadvisor.cli.belonging import refuse_unread_flags
from fastadvisor.cli.help import format_help
from fastadvisor.config import Setting, UnknownSetting, answer_near_miss, list_settings
from fastadvisor.errors import UserError, suggest

C = TypeVar("C", bound=config.Config)

COMMANDS: dict[str, type[config.Config]] = {
    "train": config.Config,
    "compare": config.CompareConfig,
    "data check": config.CheckConfig,
}
"""The commands whose flags are settings."""
DECIDE_DEFAULTS = ("dataset", "noise", "labels", "epochs")
"""Flags that other settings' defaults depend on (``config.resolve``), so ``--help`` heeds them."""
VALUES_OF_SWITCHES = ("true", "false", "yes", "no", "on", "off", "0", "1")


@dataclass
class Flags:
    """The flags on a command line."""

    values: dict[str, Any] = field(default_factory=dict)
    """By the name of the setting; the last one wins."""
    config: str | None = None
    """The recipe or file."""
    help: Literal["essentials", "all"] | None = None
    """The page asked for."""


def parse_config(kind: type[C], command: str, description: str, args: Sequence[str]) -> C:
    """Build a command's configuration from its flags, on top of ``--config`` and the data set's recipe.

    Args:
        kind: the configuration of the command.
        command: its name, as "train".
        description: of it, for ``--help``.
        args: the words after its name.

    Raises:
        UserError: an unknown flag, one that nothing would read, or a bad value.
        SystemExit: a page of help was asked for, and has been printed.
    """
    if not {"--help-all", "--help_all"} & set(args):
        try:
            _parse(kind, command, description, args)  # mistakes, and the first page of help, need not wait for torch
        except UnknownSetting as error:
            if not may_belong_to_method(error.name, kind):
                raise
    load_methods()
    resolved, flags = _parse(kind, command, description, args)
    refuse_unread_flags(list_settings(kind), flags.values, resolved)
    return resolved


def may_belong_to_method(name: str, kind: type[config.Config]) -> bool:
    """Return whether the setting ``name``, or the setting it is a misspelling of, may belong to a method.

    The files of the methods are searched for such a field, since importing them imports torch.
    """
    texts = [file.read_text("utf-8") for file in (files("fastadvisor") / "methods").iterdir() if file.name.endswith(".py")]
    known = set(list_settings(kind))
    fields = {field for text in texts for field in re.findall(r"^ +(\w+): ", text, re.MULTILINE)} - known
    return bool({name, name.removeprefix("no_"), *difflib.get_close_matches(name, [*fields, *known], n=1)} & fields)


def load_methods() -> None:
    """Import the methods, which register their settings; they import torch."""
    importlib.import_module("fastadvisor.methods")


def _parse(kind: type[C], command: str, description: str, args: Sequence[str]) -> tuple[C, Flags]:
    settings = list_flags(kind)
    flags = read_flags(settings, args, command)
    if flags.help is not None:
        known = {name: value for name, value in flags.values.items() if name in DECIDE_DEFAULTS}
        defaults = config.resolve(kind, flags.config, **known)
        print(format_help(command, description, list(settings.values()), vars(defaults), essentials=flags.help == "essentials"))
        raise SystemExit(0)
    if {"epochs", "iterations"} <= flags.values.keys() and flags.values["iterations"] is not None:
        raise UserError("--epochs and --iterations both say how long the run is: drop one of the two.")
    return config.resolve(kind, flags.config, **flags.values), flags


def list_flags(kind: type[config.Config]) -> dict[str, Setting]:
    """Return the settings that are flags of the command with the configuration ``kind``."""
    return {name: setting for name, setting in list_settings(kind).items() if kind.has_flag(name)}


def read_flags(settings: Mapping[str, Setting], args: Sequence[str], command: str) -> Flags:
    """Read ``args``; values become numbers where the setting is one, and are not checked otherwise.

    Raises:
        UserError: a word that is no flag and no value of one, or a flag without its value.
    """
    flags, words = Flags(), list(args)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        off = name.removeprefix("no_")
        if word in ("-h", "--help", "--help-all", "--help_all"):
            flags.help = "all" if word.endswith("all") or flags.help == "all" else "essentials"
        elif not word.startswith("--") or word == "--":
            refuse_word(word, command)
        elif name == "config":
            flags.config = value if equals else _value(words, flag, command)
        elif name in settings:
            flags.values[name] = _read(settings[name], [value] if equals else None, words, command)
        elif off in settings and bool in settings[off].alternatives:
            if equals or (words and words[0].lower() in VALUES_OF_SWITCHES):
                raise _takes_no_value(flag, settings[off])
            flags.values[off] = False
        else:
            refuse_flag(flag, [*settings, "config"], command)
    return flags


def _read(setting: Setting, given: list[str] | None, words: list[str], command: str) -> Any:
    """Return the value of ``setting``: ``given`` after an equals sign, else the next of ``words``, which are used up."""
    if setting.is_switch:
        if given is not None or (words and words[0].lower() in VALUES_OF_SWITCHES):
            raise _takes_no_value(setting.flag, setting)
        return True
    if setting.is_list:
        texts = given or []
        while given is None and words and not words[0].startswith("--"):
            texts.append(words.pop(0))
        values = [setting.from_text(text) for text in texts]
        return None if values == [None] else tuple(values)
    if given is None and bool in setting.alternatives and (not words or words[0].startswith("--")):
        return True  # --resume alone
    return setting.from_text(_value(words, setting.flag, command) if given is None else given[0])


def _value(words: list[str], flag: str, command: str) -> str:
    if not words or words[0].startswith("--"):
        raise UserError(f"{flag} needs a value; see 'fastadvisor {command} --help'.")
    return words.pop(0)


def _takes_no_value(flag: str, setting: Setting) -> UserError:
    return UserError(f"{flag} takes no value; write {setting.flag} or --no-{setting.flag[2:]}.")


def refuse_word(word: str, command: str) -> NoReturn:
    """Raise a UserError about ``word``, which is no flag and no value of one."""
    if word.startswith("-") and (answer := answer_near_miss(word.partition("=")[0], list_settings(config.Config))) is not None:
        raise UserError(f"Unknown flag {word.partition('=')[0]}: {answer}")
    raise UserError(f"Unexpected argument {word!r}; see 'fastadvisor {command} --help'.")


def refuse_flag(flag: str, known: Collection[str], command: str) -> NoReturn:
    """Raise a UserError about ``flag``, which is none of ``known``: whose it is, what it is called here, or the nearest.

    Args:
        flag: as it was typed, without its value.
        known: names of the flags that the command has, with underscores.
        command: its name.
    """
    name = flag.removeprefix("--").replace("-", "_")
    for other, kind in COMMANDS.items():
        theirs = list_flags(kind)
        off = name.removeprefix("no_")
        if other != command and (name in theirs or (off in theirs and off not in known and theirs[off].is_switch)):
            twin = [one for one in known if one.rstrip("s") == name.rstrip("s")]
            near = f" Did you mean '--{twin[0]}'?" if twin else ""
            raise UserError(f"{flag} is a flag of 'fastadvisor {other}', and 'fastadvisor {command}' does not have it.{near}")
    if command in COMMANDS and (answer := answer_near_miss(name, known)) is not None:
        raise UserError(f"Unknown flag {flag}: {answer}")
    flags = [f"--{one.replace('_', '-')}" for one in known]
    raise UnknownSetting(f"Unknown flag {flag}.{suggest(flag.replace('_', '-'), flags)}", name)
