"""What the settings of several commands share."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import ConfigError

T = TypeVar("T")


def nested(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of settings from dictionaries that a command's parser has checked; keys left out have defaults."""
    kinds = typing.get_type_hints(cls)
    built = {
        key: nested(kinds[key], value) if dataclasses.is_dataclass(kinds[key]) else value
        for key, value in values.items()
    }
    return cls(**built)


def require(least: float, **settings: float | None) -> None:
    """ConfigError, naming the key, for the first setting that is less than `least`, NaN or infinite; None passes."""
    for key, number in settings.items():
        if number is not None and not least <= number < math.inf:
            raise ConfigError(f"{key.replace('__', '.')} must be {least} or more, got {number}")


def require_positive(**settings: float | None) -> None:
    """ConfigError, naming the key, for the first setting that is no number above 0; None passes."""
    for key, number in settings.items():
        if number is not None and not 0 < number < math.inf:
            raise ConfigError(f"{key.replace('__', '.')} must be more than 0, got {number}")
