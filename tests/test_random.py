"""Random numbers on trn: those of a CPU generator with the same seed, and a state of 16 bytes."""

import copy
import pickle
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Draw = Callable[[str], Tensor]


def full(value: float, device: str, size: int = 50) -> Tensor:
    return torch.full((size,), float(value), device=device)


DRAWS: dict[str, Draw] = {
    "rand": lambda d: torch.rand(7, device=d),
    "rand, double": lambda d: torch.rand(7, device=d, dtype=torch.float64),
    "rand, large": lambda d: torch.rand(100_003, device=d),
    "randn of few": lambda d: torch.randn(7, device=d),
    "randn of 16": lambda d: torch.randn(16, device=d),
    "randn, large": lambda d: torch.randn(100_003, device=d),
    "randn, double": lambda d: torch.randn(7, device=d, dtype=torch.float64),
    "randn, bfloat16": lambda d: torch.randn(20, device=d, dtype=torch.bfloat16),
    "randn, complex": lambda d: torch.randn(9, device=d, dtype=torch.complex64),
    "randn in a column": lambda d: torch.zeros(9, 4, device=d)[:, 1].normal_(),
    "randint": lambda d: torch.randint(-5, 100, (9,), device=d),
    "randint of 64 bits": lambda d: torch.randint(0, 2**40, (9,), device=d),
    "randperm": lambda d: torch.randperm(50, device=d),
    "like": lambda d: torch.rand_like(full(1, d)) + torch.randn_like(full(1, d)),
    "randint_like": lambda d: torch.randint_like(full(1, d), 9),
    "bernoulli": lambda d: torch.bernoulli(full(0.3, d)),
    "bernoulli_": lambda d: full(0, d).bernoulli_(0.3),
    "bernoulli_ of a tensor": lambda d: full(0, d).bernoulli_(torch.linspace(0, 1, 50, device=d)),
    "dropout": lambda d: F.dropout(full(1, d)),
    "native_dropout": lambda d: torch.native_dropout(full(1, d), 0.5, True)[0],
    "alpha_dropout": lambda d: F.alpha_dropout(full(1, d), training=True),
    "dropout2d": lambda d: F.dropout2d(torch.ones(2, 9, 3, 3, device=d)),
    "normal_": lambda d: full(0, d, 5).normal_(1, 2),
    "normal of tensors": lambda d: torch.normal(full(1, d), full(2, d)),
    "uniform_": lambda d: full(0, d).uniform_(-1, 1),
    "exponential_": lambda d: full(0, d).exponential_(),
    "cauchy_": lambda d: full(0, d).cauchy_(),
    "log_normal_": lambda d: full(0, d).log_normal_(),
    "geometric_": lambda d: full(0, d).geometric_(0.3),
    "random_": lambda d: full(0, d).random_(),
    "multinomial": lambda d: torch.multinomial(torch.tensor([0.1, 0.2, 0.7], device=d), 10, True),
    "multinomial, all": lambda d: torch.multinomial(torch.tensor([0.1, 0.2, 0.7], device=d), 3),
    "poisson": lambda d: torch.poisson(full(3, d)),
    "binomial": lambda d: torch.binomial(full(10, d), full(0.3, d)),
    "gamma": lambda d: torch._standard_gamma(full(1, d)),
    "dirichlet": lambda d: torch.distributions.Dirichlet(full(1, d)).sample(),
    "rrelu": lambda d: F.rrelu(full(-1, d), training=True),
    "gumbel_softmax": lambda d: F.gumbel_softmax(full(1, d)),
    "fractional_max_pool2d": lambda d: F.fractional_max_pool2d(
        torch.arange(64.0, device=d).view(1, 1, 8, 8), 2, output_size=3
    ),
    "trunc_normal_": lambda d: nn.init.trunc_normal_(full(0, d)),
    "a layer's weights": lambda d: nn.Linear(5, 6, device=d).weight.detach(),
}


def twice(draw: Draw, device: str) -> list[Tensor]:
    torch.manual_seed(11)
    return [draw(device).cpu(), draw(device).cpu()]


@pytest.mark.parametrize("name", DRAWS)
def test_same_numbers_as_the_cpu(name: str) -> None:
    """Also at the second draw; and the CPU's own generator does not move."""
    expected = twice(DRAWS[name], "cpu")
    torch.manual_seed(11)
    before = torch.get_rng_state()
    actual = twice(DRAWS[name], "trn")
    assert all(map(torch.equal, expected, actual))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_per_device() -> None:
    torch.manual_seed(5)
    first = [torch.rand(3, device=f"trn:{index}").cpu() for index in range(3)]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    torch.rand(4, device="trn:1")
    assert not torch.equal(torch.rand(3, device="trn:0").cpu(), torch.rand(3, device="trn:1").cpu())
    with torch.trn.device(2):
        torch.trn.manual_seed(9)
        assert torch.trn.initial_seed() == 9
    assert torch.trn.initial_seed() == 5
    torch.trn.manual_seed_all(6)
    assert {generator.initial_seed() for generator in torch.trn.default_generators} == {6}
    assert len(torch.trn.default_generators) == torch.trn.device_count()
    assert torch.initial_seed() == 5, "the CPU keeps its own"


def test_seeding_at_random() -> None:
    torch.trn.seed()
    one = torch.trn.initial_seed()
    torch.trn.seed_all()
    seeds = {generator.initial_seed() for generator in torch.trn.default_generators}
    assert len(seeds) == 1 and one not in seeds
    assert torch.seed() == torch.trn.initial_seed()


def test_a_negative_seed_is_torchs() -> None:
    for seed in (-3, 2**63, 2**64 - 1):
        assert torch.Generator("trn").manual_seed(seed).initial_seed() == (
            torch.Generator().manual_seed(seed).initial_seed()
        )


def test_generator_argument() -> None:
    generator = torch.Generator("trn").manual_seed(3)
    before = torch.trn.get_rng_state()
    drawn = [
        torch.rand(5, generator=generator, device="trn"),
        torch.empty(5, device="trn").normal_(generator=generator),
        torch.randperm(5, generator=generator, device="trn"),
    ]
    cpu = torch.Generator().manual_seed(3)
    assert torch.equal(drawn[0].cpu(), torch.rand(5, generator=cpu))
    assert torch.equal(drawn[1].cpu(), torch.empty(5).normal_(generator=cpu))
    assert torch.equal(drawn[2].cpu(), torch.randperm(5, generator=cpu))
    assert torch.equal(torch.trn.get_rng_state(), before), "the default generator did not move"
    assert generator.device == torch.device("trn:0")
    assert torch.Generator("trn:3").device == torch.device("trn:3")


def test_wrong_generators() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'trn' device type for generator but found"):
        torch.rand(5, device="trn", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found"):
        torch.rand(5, generator=torch.Generator("trn"))
    with pytest.raises(RuntimeError, match="Invalid trn device index 99: this process has"):
        torch.Generator("trn:99")


def words(state: Tensor) -> tuple[int, int]:
    """The seed and the offset that a state consists of."""
    assert (state.shape, state.dtype, state.device.type) == ((16,), torch.uint8, "cpu")
    return struct.unpack("<Qq", bytes(state.tolist()))


def test_state_is_seed_and_draws() -> None:
    torch.trn.manual_seed(7)
    assert words(torch.trn.get_rng_state()) == (7, 0)
    torch.rand(3, device="trn")
    assert words(torch.trn.get_rng_state()) == (7, 3)
    torch.rand(3, device="trn", dtype=torch.float64)
    assert words(torch.trn.get_rng_state()) == (7, 9), "a double takes two words"
    torch.rand(1000, device="trn")
    assert words(torch.trn.get_rng_state()) == (7, 1009), "past the 624 words of one state"
    generator = torch.Generator("trn").manual_seed(2**63 + 1)
    assert words(generator.get_state()) == (2**63 + 1, 0)


WARM_UPS: dict[str, Draw] = {
    "nothing": lambda d: torch.empty(0, device=d),
    "rand": lambda d: torch.rand(1001, device=d),
    "randn of one": lambda d: torch.randn(1, device=d),
    "randn, odd": lambda d: torch.randn(3, device=d),
    "randn, odd and double": lambda d: torch.randn(3, device=d, dtype=torch.float64),
    "randn, large and odd": lambda d: torch.randn(4001, device=d),
}


@pytest.mark.parametrize("after", WARM_UPS)
def test_state_is_restored_exactly(after: str) -> None:
    """Also the second number of a pair that normal_ keeps for the next call."""

    def draws() -> list[Tensor]:
        return [
            torch.randn(3, device="trn"),
            torch.rand(4, device="trn"),
            torch.randn(20, device="trn"),
        ]

    torch.trn.manual_seed(5)
    WARM_UPS[after]("trn")
    state = torch.trn.get_rng_state()
    expected = draws()
    for _ in range(2):
        torch.trn.set_rng_state(state)
        assert torch.equal(torch.trn.get_rng_state(), state)
        assert all(map(torch.equal, draws(), expected))
    torch.manual_seed(5)
    WARM_UPS[after]("cpu")
    assert torch.equal(torch.randn(3), expected[0].cpu()), "and are the CPU's"


def test_a_state_written_by_hand_moves_the_offset() -> None:
    """As DTensor does to skip the numbers of other shards."""
    numbers = torch.rand(3000, generator=torch.Generator().manual_seed(7))
    torch.trn.manual_seed(7)
    state = torch.trn.get_rng_state()
    for offset in (2, 700, 2500, 0, 1248):
        state[8:] = torch.tensor([offset]).view(torch.uint8)
        torch.trn.set_rng_state(state)
        assert words(torch.trn.get_rng_state()) == (7, offset)
        assert torch.equal(torch.rand(5, device="trn").cpu(), numbers[offset : offset + 5])
    state[:8] = torch.tensor([8]).view(torch.uint8)
    torch.trn.set_rng_state(state)
    assert torch.trn.initial_seed() == 8


def test_a_state_written_by_hand_drops_a_kept_normal() -> None:
    torch.trn.manual_seed(7)
    torch.randn(3, device="trn")
    state = torch.trn.get_rng_state()
    state[8:] = torch.tensor([0]).view(torch.uint8)
    torch.trn.set_rng_state(state)
    cpu = torch.randn(3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.randn(3, device="trn").cpu(), cpu)


def test_offset_of_a_generator() -> None:
    generator = torch.Generator("trn").manual_seed(3)
    torch.rand(5, generator=generator, device="trn")
    assert generator.get_offset() == 5
    generator.set_offset(2)
    numbers = torch.rand(5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.rand(3, generator=generator, device="trn").cpu(), numbers[2:])


def test_states_of_all_devices() -> None:
    torch.trn.manual_seed_all(1)
    torch.rand(3, device="trn:1")
    states = torch.trn.get_rng_state_all()
    assert [words(state) for state in states[:3]] == [(1, 0), (1, 3), (1, 0)]
    expected = [torch.rand(2, device=f"trn:{index}") for index in range(3)]
    torch.trn.set_rng_state_all(states)
    assert all(
        torch.equal(torch.rand(2, device=f"trn:{index}"), expected[index]) for index in range(3)
    )
    state = torch.trn.get_rng_state(1)
    torch.trn.set_rng_state(state, "trn:2")
    assert torch.equal(torch.rand(4, device="trn:1").cpu(), torch.rand(4, device="trn:2").cpu())


WRONG_STATES: list[tuple[Callable[[], Tensor], type[Exception], str]] = [
    (lambda: torch.get_rng_state(), RuntimeError, "is 16 bytes (seed, offset), but got 5056"),
    (lambda: torch.zeros(16), TypeError, "RNG state must be a torch.ByteTensor"),
    (lambda: torch.zeros(16, dtype=torch.uint8, device="trn"), TypeError, "torch.ByteTensor"),
    (
        lambda: torch.full((16,), 255, dtype=torch.uint8),
        RuntimeError,
        "has offset 18446744073",
    ),
]


@pytest.mark.parametrize("state, error, text", WRONG_STATES)
def test_wrong_states(state: Callable[[], Tensor], error: type[Exception], text: str) -> None:
    torch.trn.manual_seed(4)
    with pytest.raises(error) as caught:
        torch.trn.set_rng_state(state())
    assert text in str(caught.value)
    assert words(torch.trn.get_rng_state()) == (4, 0), "and nothing changed"


def test_fork_rng() -> None:
    torch.manual_seed(1)
    before = torch.trn.get_rng_state_all()
    with torch.random.fork_rng(devices=range(2), device_type="trn"):
        torch.manual_seed(2)
        torch.rand(3, device="trn:0")
        torch.rand(3, device="trn:1")
    after = torch.trn.get_rng_state_all()
    assert [words(state) for state in after[:2]] == [words(state) for state in before[:2]]
    with torch.random.fork_rng(devices=[], device_type="trn"):
        torch.rand(3, device="trn")
    assert words(torch.trn.get_rng_state()) == (1, 3)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), lambda g: g.clone_state()]
)
def test_copies_of_a_generator(copied: Callable[[Any], torch.Generator]) -> None:
    generator = torch.Generator("trn:1").manual_seed(3)
    torch.randn(3, generator=generator, device="trn:1")
    twin = copied(generator)
    assert (twin.device, twin.get_offset()) == (generator.device, generator.get_offset())
    numbers = [torch.rand(4, generator=g, device="trn:1") for g in (twin, generator)]
    assert torch.equal(*numbers), "each goes its own way"


def test_graphsafe_state_is_shared() -> None:
    generator = torch.Generator("trn").manual_seed(3)
    state = generator.graphsafe_get_state()
    other = torch.Generator("trn")
    other.graphsafe_set_state(state)
    first = torch.rand(2, generator=other, device="trn").cpu()
    second = torch.rand(2, generator=generator, device="trn").cpu()
    numbers = torch.rand(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([first, second]), numbers)


def test_dropout_without_generator_argument_on_many_threads() -> None:
    """native_dropout draws from the CPU's default generator, which is trn's meanwhile."""
    torch.manual_seed(1)
    cpu_state = torch.get_rng_state()
    results: dict[int, Tensor] = {}

    def draw(index: int) -> None:
        x = torch.ones(2000, device=f"trn:{index}")
        results[index] = torch.stack([torch.native_dropout(x, 0.5, True)[0] for _ in range(20)])

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), cpu_state)
    expected = torch.stack(
        [torch.native_dropout(torch.ones(2000), 0.5, True)[0] for _ in range(20)]
    )
    assert all(torch.equal(results[index].cpu(), expected) for index in range(4))
