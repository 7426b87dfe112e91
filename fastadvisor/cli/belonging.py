"""Flags that nothing would read are refused, with the reason.

Only flags are: a file may hold the settings of several methods and be used with each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastadvisor.config import GIVEN, CompareConfig, Config, Setting, registered_methods
from fastadvisor.errors import UserError


def refuse_unread_flags(settings: Mapping[str, Setting], given: Mapping[str, Any], config: Config) -> None:
    """Refuse flags that the methods and the other settings of the run leave without effect.

    Args:
        settings: all there are, by name.
        given: the flags; one that is off or none asks for nothing and is let pass.
        config: what they come to, with the layers below.

    Raises:
        UserError: a flag that nothing reads.
    """
    methods = methods_of(config)
    for name, value in given.items():
        if value is None or value is False:
            continue
        setting = settings[name]
        if methods and setting.methods is not None and not set(setting.methods) & set(methods):
            what = f"--methods is {','.join(methods)}" if isinstance(config, CompareConfig) else f"--method is {methods[0]}"
            raise UserError(
                f"{setting.flag} belongs to {', '.join(setting.methods)}; {what}: drop the flag, or name one of these methods."
            )
        for only in setting.conditions:
            failing = only.failing(vars(config))
            if failing is not None:
                raise UserError(_sentence(setting, settings[failing], only.conditions[failing], getattr(config, failing)))


def methods_of(config: Config) -> list[str]:
    """Return the methods that ``config`` trains; none if one of them is unknown, which is said elsewhere."""
    names = config.methods.split(",") if isinstance(config, CompareConfig) else [config.method]
    methods = [name.strip() for name in names if name.strip()]
    return methods if set(methods) <= set(registered_methods()) else []


def _sentence(setting: Setting, other: Setting, accepted: Sequence[Any], value: Any) -> str:
    if accepted == (True,):
        return f"{setting.flag} is for {other.flag}, which is off: add {other.flag}, or drop {setting.flag}."
    if GIVEN in accepted:
        return f"{setting.flag} is for {other.flag}, which is not given: add it, or drop {setting.flag}."
    words = [str(one) for one in accepted]
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    return (
        f"{setting.flag} is for {other.flag} {listed}, and {other.flag} is {value}: "
        f"add {other.flag} {words[0]}, or drop {setting.flag}."
    )
