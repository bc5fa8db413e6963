"""Every test has torch and the device; `--update-golden` rewrites what tests compare with."""

import pytest
import torch

import torch_trn  # noqa: F401

# Small operators on a busy machine: OpenMP's threads would spend their time waiting for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write expected texts anew instead of comparing with them; read the diff",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether expected texts are to be written anew."""
    return bool(request.config.getoption("--update-golden"))
