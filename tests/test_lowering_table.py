"""Every registered lowering over sizes that straddle the hardware's edges.

Each Program must build (the Builder checks SBUF and PSUM capacity, partition and free size limits),
move at least the bytes that no Program could avoid, and do exactly the flops of its product.
"""

from __future__ import annotations

import lowering_rows_moves  # noqa: F401  (adds its rows)
import lowering_rows_nn  # noqa: F401  (adds its rows)
import pytest
from lowering_rows import ROWS

from torch_trn.chip import system
from torch_trn.lowering import lower, registered
from torch_trn.scheduler import schedule

SIZES = (0, 1, 127, 128, 129, 512, 513)
CORES = {name: system(name).chip.core for name in ("trn1.32xlarge", "trn2.48xlarge")}


def test_every_registered_name_has_a_row() -> None:
    names = {name.removeprefix("aten::") for name in registered()}
    assert names - set(ROWS) == set(), "lowerings without a row"
    assert set(ROWS) - names == set(), "rows without a lowering"


@pytest.mark.parametrize("name", sorted(ROWS))
def test_row(name: str) -> None:
    for n in SIZES:
        case = ROWS[name](n)
        for core in CORES.values():
            program = lower(case.call(f"aten::{name}"), core, 1)
            assert program.hbm_read_bytes >= (case.read_bytes if n else 0), f"n={n}"
            assert program.hbm_write_bytes >= (case.write_bytes if n else 0), f"n={n}"
            if case.flops is not None:
                assert program.flops == case.flops, f"n={n}"


@pytest.mark.parametrize("name", sorted(ROWS))
def test_share_of_two_cores_is_not_more_work(name: str) -> None:
    core = CORES["trn2.48xlarge"]
    call = ROWS[name](513).call(f"aten::{name}")
    whole, half = lower(call, core, 1), lower(call, core, 2)
    assert half.flops <= max(whole.flops, 1)
    assert schedule(half, core).duration_ps <= 1.25 * schedule(whole, core).duration_ps
