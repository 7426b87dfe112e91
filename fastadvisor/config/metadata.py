"""Metadata in the type of a setting: its range, whether it is essential, and the conditions under which it is read.

A component, which is a small dataclass of settings, may have two class variables: ``TITLE``, under which ``--help`` lists its
settings, and ``ONLY``, an :class:`Only` that holds for each of them.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

Count = Annotated[int, Field(gt=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Mark:
    """A property that a setting has or has not, written into its type: ``Annotated[Count, ESSENTIAL]``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        """Return the name."""
        return self.name


ESSENTIAL = Mark("ESSENTIAL")
"""The first page of ``--help`` lists the setting; the others are on that of ``--help-all``."""
GIVEN = Mark("GIVEN")
"""In a condition: any value but None."""


class Only:
    """The condition under which a setting is read; with any other settings it would be ignored.

    Args:
        conditions: by the name of another setting, the value or the tuple of values that it must have; all must hold.
    """

    def __init__(self, **conditions: Any) -> None:
        self.conditions = {name: values if isinstance(values, tuple) else (values,) for name, values in conditions.items()}

    def __repr__(self) -> str:
        """Return the conditions."""
        return f"Only({self.conditions})"

    def failing(self, settings: Mapping[str, Any]) -> str | None:
        """Return the first setting that has none of the values it must have, or None."""
        for name, values in self.conditions.items():
            if not (settings[name] in values or (GIVEN in values and settings[name] is not None)):
                return name
        return None
