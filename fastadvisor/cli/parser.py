"""The commands whose flags are not settings: evaluate, export, replay, recipes, env."""

import argparse
import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from fastadvisor import config
from fastadvisor.cli.flags import refuse_flag
from fastadvisor.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one sentence instead of the usage and a message."""

    def __init__(self, prog: str, description: str = "", add_help: bool = True) -> None:
        super().__init__(prog=prog, description=description, add_help=add_help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a UserError."""
        raise UserError(f"{message[0].upper()}{message[1:]}; see '{self.prog} --help'.")

    def parse_all(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse ``args``; what is left over raises a UserError that names the nearest flag."""
        values, left = self.parse_known_args(args)
        for word in left:
            if word.startswith("--") and word != "--":
                own = [flag[2:].replace("-", "_") for flag in self._option_string_actions if flag.startswith("--")]
                refuse_flag(word.partition("=")[0], own, self.prog.removeprefix("fastadvisor "))
        if left:
            raise UserError(f"Unexpected argument {left[0]!r}; see '{self.prog} --help'.")
        return values


@contextlib.contextmanager
def name_settings_of_run(parser: Parser, run: str) -> Iterator[None]:
    """Let messages of the block name no flag that the command lacks: a setting of a run is a line of its config.yaml."""
    own = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    known = {setting.flag for setting in config.list_settings(config.Config).values()}
    file = os.path.join(run, "config.yaml")

    def named(match: re.Match[str]) -> str:
        flag = match[0]
        return flag if flag in own or flag not in known else f"{flag[2:].replace('-', '_')} in {file}"

    try:
        yield
    except UserError as error:
        parts = re.split(r"(\(fastadvisor [^)]*\)|'fastadvisor [^']*')", str(error))  # commands, which have flags of their own
        raise UserError(
            "".join(
                p if at % 2 else re.sub(r"(?<![\w/.-])--[a-z][a-z0-9-]*(?![\w/]|\.\w)", named, p) for at, p in enumerate(parts)
            )
        ) from None
