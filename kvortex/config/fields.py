"""Common to all settings: sizes as text, conversion to the field's type, suggestions for misspelled names."""

import difflib
import math
import os
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from kvortex.config.redaction import without_passwords
from kvortex.errors import ConfigError

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))
LEAST_BYTES = 4096  # a page; a smaller size was probably meant in another unit

_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse_bytes(text: str) -> int:
    """`"16GiB"`, `"512 MiB"`, `"4096"` -> bytes.

    Raises:
        ConfigError: not a size.
    """
    stripped = text.strip().lower()
    digits = stripped.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = _UNITS.get(stripped[len(digits) :].strip())
    try:
        if unit is None:
            raise ValueError
        nbytes = float(digits) * unit
        if unit == 1 and not nbytes.is_integer():
            raise ValueError
        return int(nbytes)
    except (ValueError, OverflowError):
        raise _error(f"{text!r} is no size; write it as 16GiB, 512MiB or a number of bytes") from None


def format_bytes(nbytes: float) -> str:
    """`1610612736` -> `"1.5 GiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with the message, in which passwords are not shown, unless the condition holds."""
    if not condition:
        raise _error(message)


def require_size(name: str, nbytes: int, example: str) -> None:
    """Raises `ConfigError` for a size below a page, probably meant in another unit; the message has an example."""
    require(nbytes >= 1, f"{name} must be at least 1, not {nbytes}")
    require(
        nbytes >= LEAST_BYTES,
        f"{name} = {nbytes} is a number of bytes, and less than a page: did you mean {example!r}?",
    )


def conform(settings: Any, *, prefix: str = "", paths: Iterable[str] = ()) -> None:
    """Convert the fields of a frozen dataclass to their types; called first in `__post_init__`.

    Whole numbers of any type become `int`, other numbers `float`. Sizes (`...bytes`, `quota`) may be text. Paths may be
    any `os.PathLike` and begin with `~`. A mapping becomes a section; so does a plain value, if the section names the
    field for it. If a time may be None (no limit), infinity becomes None.

    Args:
        settings: the object.
        prefix: text before the field's name in messages.
        paths: names of the fields that are paths.

    Raises:
        ConfigError: a value of the wrong type; the message names the field.
    """
    for name, hint in hints_of(type(settings)).items():
        value = getattr(settings, name)
        shown = prefix + name
        held = _path(shown, value) if name in paths else conformed(shown, value, hint)
        if held is not value:
            object.__setattr__(settings, name, held)


def changed_fields(settings: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, by name."""
    default = type(settings)()
    values = {name: getattr(settings, name) for name in hints_of(type(settings))}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def from_text(name: str, text: str, hint: Any) -> Any:
    """Convert the text of an environment variable to a field's value; other text is returned unchanged.

    Raises:
        ConfigError: the text of a bool field is neither true nor false.
    """
    kind, is_optional = _without_none(hint)
    stripped = text.strip()
    if is_optional and stripped.lower() == "none":
        return None
    if kind is bool:
        require(stripped.lower() in _TRUE + _FALSE, f"{name} = {text!r}: write 1 or 0")
        return stripped.lower() in _TRUE
    if kind in (int, float) and not is_size(name):
        try:
            return float(stripped) if kind is float or not stripped.lstrip("+-").isdigit() else int(stripped)
        except ValueError:
            return text
    return text


def is_size(name: str) -> bool:
    """Whether a setting of that name is a number of bytes, which may be written as text such as "16GiB"."""
    return name.endswith(("bytes", "quota"))


def require_known(names: Iterable[object], known: Collection[str], owner: str, what: str = "setting") -> None:
    """Raises `ConfigError` for an unknown name; the message suggests the nearest one."""
    for name in names:
        if name not in known:
            guess = nearest(str(name), known)
            hint = f": did you mean {guess!r}?" if guess else ""
            raise _error(f"unknown {what} {name!r}{hint}; {owner} knows {', '.join(sorted(known))}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is so close that it was probably meant; None if there is none."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return found[0] if found else None


def hints_of(kind: Any) -> Mapping[str, Any]:
    """Types of a dataclass's fields by name."""
    return _hints(kind)


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0], len(kinds) < len(get_args(hint))
    return hint, False


def conformed(name: str, value: Any, hint: Any) -> Any:
    """A value as its type, as `conform` does with each field.

    Raises:
        ConfigError: it has the wrong type; the message has its name.
    """
    kind, is_optional = _without_none(hint)
    if value is None and is_optional:
        return None
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        value = value.item()
    if kind is bool:
        return _boolean(name, value)
    if kind is int:
        return _whole_number(name, value)
    if kind is float:
        seconds = _number(name, value)
        if is_optional and seconds == math.inf:
            return None
        require(math.isfinite(seconds), f"{name} must be a finite number, not {value!r}")
        return seconds
    if get_origin(kind) is tuple:
        return _texts(name, value)
    is_section: bool = is_dataclass(kind)
    if is_section and not isinstance(value, kind):
        return kind(**section_fields(name, value, kind))
    require(isinstance(value, kind), f"{name} must be {kind.__name__}, not {_shown(value)}")
    return value


def section_fields(name: str, value: Any, kind: Any) -> Mapping[str, Any]:
    """The fields of a section that a mapping, or a plain value in the section's place, gives.

    Raises:
        ConfigError: an unknown name, or neither a mapping nor a plain value that the section takes.
    """
    plain: str = getattr(kind, "plain", "")
    if isinstance(value, Mapping):
        require_known(value, hints_of(kind), kind.__name__)
        return value
    is_list = bool(plain) and get_origin(hints_of(kind)[plain]) is tuple
    is_plain = isinstance(value, (list | tuple | str) if is_list else (str | os.PathLike | Real))
    if plain and is_plain and value is not True and value is not False:
        return {plain: value}
    ways = f"a mapping of its settings, or its {plain} alone" if plain else "a mapping of its settings"
    raise _error(f"{name} must be {kind.__name__}, {ways}; not {_shown(value)}")


def _boolean(name: str, value: Any) -> bool:
    require(isinstance(value, bool), f"{name} must be true or false (bool), not {_shown(value)}")
    return bool(value)


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, str) and is_size(name):
        return parse_bytes(value)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and (isinstance(value, Integral) or float(value).is_integer()):
        return int(value)
    example = ', such as "16GiB"' if is_size(name) else ""
    raise _error(f"{name} must be a whole number (int){example}, not {_shown(value)}")


def _number(name: str, value: Any) -> float:
    require(
        isinstance(value, Real) and not isinstance(value, bool), f"{name} must be a number (float), not {_shown(value)}"
    )
    return float(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = value.split() if isinstance(value, str) else value
    is_list = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
    require(is_list, f"{name} must be a list of texts, or a text with spaces between them; not {_shown(value)}")
    return tuple(texts)


def _path(name: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    require(isinstance(text, str), f"{name} must be a path (str), not {_shown(value)}")
    require("\0" not in text, f"{name} = {text!r}: no path has a null character; write it without")
    expanded = os.path.expanduser(text)
    require(not expanded.startswith("~"), f"{name} = {text!r}: there is no such home; write the path in full")
    return expanded


def _shown(value: Any) -> str:
    return f"{type(value).__name__} ({value!r})"


def _error(message: str) -> ConfigError:
    return ConfigError(without_passwords(message))
