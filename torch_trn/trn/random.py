"""Random numbers: one generator per device.

A trn generator draws what a CPU generator with the same seed draws. Its state is 16 bytes, the
seed and the number of draws, as DTensor wants it. Seeding initialises no device, so a program may
seed and then fork.
"""

from collections.abc import Iterable

import torch

from torch_trn import _C
from torch_trn.trn._utils import Device, device_index


def default_generators() -> tuple[torch.Generator, ...]:
    """The generator of every device, which operators use that are given none."""
    return tuple(_C.default_generator(index) for index in range(_C.device_count()))


def _get_generator(device: Device = None) -> torch.Generator:
    """The default generator of a device, under the name by which AOTAutograd asks for it."""
    generator: torch.Generator = _C.default_generator(device_index(device))
    return generator


def get_rng_state(device: Device = "trn") -> torch.Tensor:
    """The state of a device's generator: 16 bytes in a uint8 tensor on the CPU.

    Raises:
        RuntimeError: no such device.
    """
    return _get_generator(device).get_state()


def get_rng_state_all() -> list[torch.Tensor]:
    """The states of the generators of all devices, in their order."""
    return [get_rng_state(index) for index in range(_C.device_count())]


def set_rng_state(new_state: torch.Tensor, device: Device = "trn") -> None:
    """Put the state of a device's generator back to what `get_rng_state` returned.

    Raises:
        RuntimeError: no such device, or a tensor that is no state.
    """
    _get_generator(device).set_state(new_state)


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Put the states of all devices back to what `get_rng_state_all` returned.

    Raises:
        RuntimeError: more states than devices, or a tensor that is no state.
    """
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def manual_seed(seed: int) -> None:
    """Seed the current device's generator."""
    _get_generator().manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed the generators of all devices alike; `torch.manual_seed` calls this."""
    for generator in default_generators():
        generator.manual_seed(int(seed))


def seed() -> None:
    """Seed the current device's generator with a number that differs from run to run."""
    _get_generator().seed()


def seed_all() -> None:
    """Seed the generators of all devices alike, with a number that differs from run to run."""
    generators = default_generators()
    if generators:
        manual_seed_all(generators[0].seed())


def initial_seed() -> int:
    """The seed of the current device's generator."""
    return _get_generator().initial_seed()
