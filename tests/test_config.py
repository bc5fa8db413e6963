"""Settings: where they come from, what they refuse and with which words, and who may forbid."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torch_trn import config
from torch_trn.config import Config

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(autouse=True)
def settings_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts from the defaults, without validators, and leaves no trace."""
    monkeypatch.setattr(config, "_current", Config())
    monkeypatch.setattr(config, "_validators", [])
    yield


def test_defaults() -> None:
    assert config.from_environment({}) == Config(
        system="trn2.48xlarge",
        lnc=None,
        numerics="host",
        data_bytes=64 << 10,
        integer_data_bytes=16 << 20,
        none_item="raise",
        hbm_bytes=None,
        debug=0,
        strict=False,
    )


def test_every_setting_has_a_variable() -> None:
    environment = {
        "TRN_SYSTEM": "trn1.2xlarge",
        "TRN_LNC": "1",
        "TRN_NUMERICS": "none",
        "TRN_DATA_BYTES": "1MiB",
        "TRN_INTEGER_DATA_BYTES": "0",
        "TRN_NONE_ITEM": "nan",
        "TRN_HBM_BYTES": "16GiB",
        "TRN_DEBUG": "2",
        "TRN_STRICT": "yes",
    }
    assert [setting.variable for setting in config.SETTINGS] == list(environment)
    assert [setting.name for setting in config.SETTINGS] == list(config.field_names())
    assert config.from_environment(environment) == Config(
        system="trn1.2xlarge",
        lnc=1,
        numerics="none",
        data_bytes=1 << 20,
        integer_data_bytes=0,
        none_item="nan",
        hbm_bytes=16 << 30,
        debug=2,
        strict=True,
    )


def test_an_empty_variable_is_the_default() -> None:
    assert config.from_environment(dict.fromkeys(["TRN_SYSTEM", "TRN_LNC"], "")) == Config()


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (1, 1),
        ("4096", 4096),
        ("24GiB", 24 << 30),
        ("24 GiB", 24 << 30),
        ("1.5MiB", 3 << 19),
        ("2KB", 2000),
        ("1TB", 10**12),
        ("7B", 7),
        (None, None),
    ],
)
def test_hbm_bytes(value: object, nbytes: int | None) -> None:
    assert config.configure(hbm_bytes=value).hbm_bytes == nbytes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "system",
            "  ",
            "system (TRN_SYSTEM) is '  '; it must be the name of an instance, such as "
            "'trn2.48xlarge'",
        ),
        (
            "lnc",
            0,
            "lnc (TRN_LNC) is 0; it must be a number of physical cores per logical core that the "
            "chip has: 1 or 2",
        ),
        (
            "lnc",
            "two",
            "lnc (TRN_LNC) is 'two'; it must be a number of physical cores per logical core that "
            "the chip has: 1 or 2",
        ),
        (
            "lnc",
            True,
            "lnc (TRN_LNC) is True; it must be a number of physical cores per logical core that "
            "the chip has: 1 or 2",
        ),
        (
            "numerics",
            "cuda",
            "numerics (TRN_NUMERICS) is 'cuda'; choices: 'host', 'tile', 'none'",
        ),
        (
            "data_bytes",
            "-1",
            "data_bytes (TRN_DATA_BYTES) is '-1'; it must be 0 or a positive whole number of "
            "bytes, alone or with a unit (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB), such as '24GiB'",
        ),
        (
            "none_item",
            "zero",
            "none_item (TRN_NONE_ITEM) is 'zero'; choices: 'raise', 'nan'",
        ),
        (
            "hbm_bytes",
            -1,
            "hbm_bytes (TRN_HBM_BYTES) is -1; it must be a positive whole number of bytes, alone "
            "or with a unit (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB), such as '24GiB'",
        ),
        ("debug", 4, "debug (TRN_DEBUG) is 4; choices: 0, 1, 2, 3"),
        (
            "strict",
            "maybe",
            "strict (TRN_STRICT) is 'maybe'; choices: 0, false, no, off or 1, true, yes, on",
        ),
    ],
)
def test_a_bad_value_names_setting_value_and_choices(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        config.configure(**{name: value})
    assert str(caught.value) == message
    assert config.get() == Config()


@pytest.mark.parametrize("value", [0, "0GiB", "1.5", "0.3KiB", "24gib", "-2GiB", "", 1.5, True])
def test_hbm_bytes_refuses(value: object) -> None:
    if value == "":
        assert config.configure(hbm_bytes=value).hbm_bytes is None
        return
    with pytest.raises(ValueError, match="positive whole number of bytes"):
        config.configure(hbm_bytes=value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 << 19, "1.50 MiB"),
        (24 << 30, "24.00 GiB"),
    ],
)
def test_sizes_to_read(nbytes: int, text: str) -> None:
    assert config.format_bytes(nbytes) == text


def test_a_bad_variable_has_the_same_words() -> None:
    with pytest.raises(ValueError) as caught:
        config.from_environment({"TRN_DEBUG": "loud"})
    assert str(caught.value) == "debug (TRN_DEBUG) is 'loud'; choices: 0, 1, 2, 3"


def test_an_unknown_setting_names_the_choices() -> None:
    with pytest.raises(ValueError) as caught:
        config.configure(sytem="trn1.2xlarge")
    assert str(caught.value) == (
        "no setting is named 'sytem'; choices: system, lnc, numerics, data_bytes, "
        "integer_data_bytes, none_item, hbm_bytes, debug, strict"
    )


def test_configure_changes_all_or_nothing() -> None:
    with pytest.raises(ValueError):
        config.configure(strict=True, debug=9)
    assert config.get() == Config()
    assert config.configure(strict=True, debug=1) == Config(strict=True, debug=1)
    assert config.get() == Config(strict=True, debug=1)


def test_override_puts_back_also_after_an_error() -> None:
    config.configure(debug=1)
    with pytest.raises(KeyError):
        with config.override(debug=2, strict=True) as settings:
            assert settings == config.get() == Config(debug=2, strict=True)
            raise KeyError
    assert config.get() == Config(debug=1)


def test_override_puts_back_only_what_it_changed() -> None:
    with config.override(debug=2):
        config.configure(strict=True)
    assert config.get() == Config(strict=True)


def test_validators_see_old_and_new_before_the_change() -> None:
    seen = []

    def validator(old: Config, new: Config) -> None:
        assert config.get() == old
        seen.append((old.debug, new.debug))

    config.on_change(validator)
    with config.override(debug=3):
        pass
    config.configure(debug=0)
    assert seen == [(0, 3), (3, 0)], "no call for a change to the same settings"


def test_a_validator_forbids_a_change() -> None:
    def validator(old: Config, new: Config) -> None:
        if old.system != new.system:
            raise ValueError(f"system cannot become {new.system}: the device was used already")

    config.on_change(validator)
    with pytest.raises(ValueError) as caught:
        config.configure(system="trn1.2xlarge", strict=True)
    assert str(caught.value) == "system cannot become trn1.2xlarge: the device was used already"
    assert config.get() == Config()


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.get().debug = 1  # type: ignore[misc]


def test_the_environment_is_read_once() -> None:
    program = (
        "import os; from torch_trn import config; config.get(); os.environ['TRN_DEBUG'] = '3'; "
        "print(config.get())"
    )
    environment = {"PATH": "", "TRN_DEBUG": "0", "TRN_STRICT": "1", "TRN_HBM_BYTES": "1GiB"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(Config(hbm_bytes=1 << 30, strict=True))


def test_the_readme_has_the_table_of_settings() -> None:
    assert config.settings_table() in README.read_text()
