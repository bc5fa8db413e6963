"""The settings of the simulator: one frozen object, read from `TRN_*` variables or set from Python.

    >>> from torch_trn import config
    >>> config.get().system
    'trn2.48xlarge'
    >>> with config.override(strict=True):
    ...     config.get().strict
    True

`SETTINGS` is the one list of them: parsing, error texts and the table in the README come from it.
This file knows no hardware (import level 0): whether a system exists and which LNC its chip has is
judged by validators that `runtime` registers with `on_change`.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

NUMERICS = ("host", "tile", "none")
"""Who computes values: ATen's CPU kernels, on the tensor's own memory; the Programs that are timed;
or nobody, for tensors above a small size."""

NONE_ITEM = ("raise", "nan")
"""What reading a number without a value does, with numerics "none"."""

DEBUG_LEVELS = (0, 1, 2, 3)

_BYTE_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("iB", 1024), ("B", 1000))
    for power, prefix in enumerate("KMGT", start=1)
}
_TRUE_WORDS = ("1", "true", "yes", "on")
_FALSE_WORDS = ("0", "false", "no", "off")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings at one moment. `None` means what the configured system's chip has."""

    system: str = "trn2.48xlarge"
    lnc: int | None = None
    numerics: str = "host"
    data_bytes: int = 64 << 10
    integer_data_bytes: int = 16 << 20
    none_item: str = "raise"
    hbm_bytes: int | None = None
    debug: int = 0
    strict: bool = False


Validator = Callable[[Config, Config], None]
"""Called as `validator(old, new)` before a change takes effect; forbids it with a ValueError."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting: its field in `Config`, its variable, what it means, and how its value is read.

    `parse` takes the text of the variable or a Python value and returns the field's value; it
    raises ValueError(<the choices>), to which `read` adds the setting's name and the value.
    """

    name: str
    variable: str
    default_text: str
    meaning: str
    parse: Callable[[Any], Any]

    def read(self, value: object) -> Any:
        """The field's value from the variable's text or a Python value.

        Raises:
            ValueError: names the setting, its variable, the value and the choices.
        """
        try:
            return self.parse(value)
        except ValueError as error:
            raise ValueError(f"{self.name} ({self.variable}) is {value!r}; {error}") from None


def _parse_system(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it must be the name of an instance, such as 'trn2.48xlarge'")
    return value.strip()


def _parse_integer(value: object) -> int | None:
    """An int from an int or its decimal text, None for anything else (True is not a count)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        return int(value)
    return None


def _parse_lnc(value: object) -> int | None:
    if value is None or value == "":
        return None
    lnc = _parse_integer(value)
    if lnc is None or lnc < 1:
        raise ValueError(
            "it must be a number of physical cores per logical core that the chip has: 1 or 2"
        )
    return lnc


def _parse_numerics(value: object) -> str:
    if value not in NUMERICS:
        raise ValueError(f"choices: {', '.join(map(repr, NUMERICS))}")
    return str(value)


def _parse_none_item(value: object) -> str:
    if value not in NONE_ITEM:
        raise ValueError(f"choices: {', '.join(map(repr, NONE_ITEM))}")
    return str(value)


def _parse_hbm_bytes(value: object) -> int | None:
    if value is None or value == "":
        return None
    return _parse_bytes(value, 1)


def _parse_data_bytes(value: object) -> int:
    return _parse_bytes(value, 0)


def _parse_bytes(value: object, least: int) -> int:
    nbytes: int | Fraction | None = _parse_integer(value)
    if nbytes is None and isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if match and match[2] in _BYTE_UNITS:
            nbytes = Fraction(match[1]) * _BYTE_UNITS[match[2]]
    if nbytes is None or nbytes < least or nbytes != int(nbytes):
        kind = "a positive whole number" if least == 1 else "0 or a positive whole number"
        raise ValueError(
            f"it must be {kind} of bytes, alone or with a unit "
            "(B, KiB, MiB, GiB, TiB, KB, MB, GB, TB), such as '24GiB'"
        )
    return int(nbytes)


def _parse_debug(value: object) -> int:
    debug = _parse_integer(value)
    if debug not in DEBUG_LEVELS:
        raise ValueError(f"choices: {', '.join(map(str, DEBUG_LEVELS))}")
    return debug


def _parse_strict(value: object) -> bool:
    word = str(int(value)) if isinstance(value, bool) else str(value).strip().lower()
    if word in _TRUE_WORDS:
        return True
    if word in _FALSE_WORDS:
        return False
    raise ValueError(f"choices: {', '.join(_FALSE_WORDS)} or {', '.join(_TRUE_WORDS)}")


SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="system",
        variable="TRN_SYSTEM",
        default_text="trn2.48xlarge",
        meaning="the simulated instance; its logical NeuronCores are the devices of a process",
        parse=_parse_system,
    ),
    Setting(
        name="lnc",
        variable="TRN_LNC",
        default_text="the chip's",
        meaning="physical NeuronCores per logical one (LNC): 2 is Trainium2's default, "
        "older chips have 1",
        parse=_parse_lnc,
    ),
    Setting(
        name="numerics",
        variable="TRN_NUMERICS",
        default_text="host",
        meaning="who computes values: `host` is ATen's CPU kernels, `tile` the Programs that are "
        "timed, `none` is nobody, for tensors above the next two sizes; times and HBM are the same",
        parse=_parse_numerics,
    ),
    Setting(
        name="data_bytes",
        variable="TRN_DATA_BYTES",
        default_text="64KiB",
        meaning="with numerics `none`: the largest floating or complex tensor that has values",
        parse=_parse_data_bytes,
    ),
    Setting(
        name="integer_data_bytes",
        variable="TRN_INTEGER_DATA_BYTES",
        default_text="16MiB",
        meaning="the same for integers and bools: ids, masks and lengths decide what a model does",
        parse=_parse_data_bytes,
    ),
    Setting(
        name="none_item",
        variable="TRN_NONE_ITEM",
        default_text="raise",
        meaning="reading a number that has no value: `raise` an error, or `nan` with one warning",
        parse=_parse_none_item,
    ),
    Setting(
        name="hbm_bytes",
        variable="TRN_HBM_BYTES",
        default_text="the chip's",
        meaning="HBM of one logical core in bytes, or with a unit as in `24GiB`",
        parse=_parse_hbm_bytes,
    ),
    Setting(
        name="debug",
        variable="TRN_DEBUG",
        default_text="0",
        meaning="1 prints a line per operator, 2 also its Program, 3 also its spans",
        parse=_parse_debug,
    ),
    Setting(
        name="strict",
        variable="TRN_STRICT",
        default_text="0",
        meaning="1 raises an error where an operator without a lowering would run on the host",
        parse=_parse_strict,
    ),
)

_SETTING_BY_NAME = {setting.name: setting for setting in SETTINGS}

_current: Config | None = None
_validators: list[Validator] = []


def from_environment(environment: Mapping[str, str]) -> Config:
    """The settings that `environment` asks for; a variable that is missing or empty is the default.

    Raises:
        ValueError: a variable has a value that its setting does not take.
    """
    return Config(
        **{
            setting.name: setting.read(environment[setting.variable])
            for setting in SETTINGS
            if environment.get(setting.variable)
        }
    )


def get() -> Config:
    """The settings in force; the environment is read once, at the first call.

    Raises:
        ValueError: a `TRN_*` variable has a value that its setting does not take.
    """
    global _current
    if _current is None:
        _current = from_environment(os.environ)
    return _current


def configure(**settings: Any) -> Config:
    """Change settings for the rest of the process; returns the settings now in force.

    All of them change or, on an error, none.

    Raises:
        ValueError: an unknown setting, a value it does not take, or a change that a validator
            forbids (such as another system after the device's first use).
    """
    old = get()
    unknown = sorted(settings.keys() - _SETTING_BY_NAME.keys())
    if unknown:
        raise ValueError(f"no setting is named {unknown[0]!r}; choices: {', '.join(field_names())}")
    new = replace(
        old, **{name: _SETTING_BY_NAME[name].read(value) for name, value in settings.items()}
    )
    _change_to(new)
    return new


@contextmanager
def override(**settings: Any) -> Iterator[Config]:
    """Change settings inside a `with` block (for every thread) and put them back at its end.

    Raises:
        ValueError: as `configure`; also at the end of the block, if a validator forbids the way
            back (such as a system that was first used inside the block).
    """
    old = get()
    new = configure(**settings)
    try:
        yield new
    finally:
        _change_to(replace(get(), **{name: getattr(old, name) for name in settings}))


def on_change(validator: Validator) -> None:
    """Register `validator(old, new)`, called before a change, which its ValueError forbids.

    It may look at both, not call `configure`. It is not called for the settings that the
    environment gave: who registers it checks those when it first uses them.
    """
    _validators.append(validator)


def field_names() -> tuple[str, ...]:
    """The names of all settings, in the order of `Config`."""
    return tuple(field.name for field in fields(Config))


def settings_table() -> str:
    """The table of settings in the README, in Markdown."""
    lines = ["| variable | `torch_trn.configure(...)` | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{s.variable}` | `{s.name}` | {s.default_text} | {s.meaning} |" for s in SETTINGS]
    return "\n".join(lines)


def format_bytes(nbytes: int) -> str:
    """A size to read, in the largest binary unit of which it has at least one: '24.00 GiB'."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(nbytes) >= _BYTE_UNITS[unit]:
            return f"{nbytes / _BYTE_UNITS[unit]:.2f} {unit}"
    return f"{nbytes} B"


def _change_to(new: Config) -> None:
    global _current
    old = get()
    if new == old:
        return
    for validator in _validators:
        validator(old, new)
    _current = new
