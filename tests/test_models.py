"""Whole models by family: training and sampling spend no time on the host, unless declared.

Values are the host's here; tests/test_models_tile.py has those of the Programs.
"""

from __future__ import annotations

import pytest
import torch
from model_families import FAMILIES, OPTIMIZERS, SAMPLING, Family

import torch_trn

DATA_DEPENDENT = "the shape of its result depends on data, and a NeuronCore Program is static"

DECLARED = {"mixtral_by_expert": {"aten::nonzero": DATA_DEPENDENT}}
"""Operators of a family that real Trainium cannot run, with the reason that the profile gives."""

GENERATING = [family for family in FAMILIES if family.prompt]

pytestmark = pytest.mark.filterwarnings("error::torch_trn.errors.LoweringWarning")


def on_host(prof: torch_trn.profiler.Profile) -> dict[str, str]:
    """The Host operators of a profile and their reasons, from the lines below its table."""
    lines = prof.table().splitlines()
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith("[host]:")), None)
    if start is None:
        return {}
    return dict(line.strip().split(": ", 1) for line in lines[start + 1 :])


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_training(family: Family) -> None:
    model, batch = family.make()
    expected = model.train()(**batch).loss.item()
    model, batch = family.make()
    model.train().to("trn")
    batch = {name: tensor.to("trn") for name, tensor in batch.items()}
    with torch_trn.profile() as prof:
        losses = []
        for make in OPTIMIZERS.values():
            optimizer = make(model.parameters())
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
    assert losses[0].item() == expected
    assert on_host(prof) == DECLARED.get(family.name, {})


@pytest.mark.parametrize("family", GENERATING, ids=str)
def test_sampling(family: Family) -> None:
    model, batch = family.make()
    model.eval()
    prompt = batch[family.prompt][:1]
    given = {"max_new_tokens": 4, "pad_token_id": 0}
    expected = model.generate(prompt, **given, **SAMPLING["greedy"])
    model.to("trn")
    with torch_trn.profile() as prof:
        for name, how in SAMPLING.items():
            tokens = model.generate(prompt.to("trn"), **given, **how)
            assert name != "greedy" or torch.equal(tokens.cpu(), expected)
    assert on_host(prof) == DECLARED.get(family.name, {})


def test_float64_stays_on_the_host() -> None:
    model, batch = next(family for family in FAMILIES if family.name == "dlrm").make()
    model.double().to("trn")
    batch = {
        name: (tensor.double() if tensor.is_floating_point() else tensor).to("trn")
        for name, tensor in batch.items()
    }
    with torch_trn.profile() as prof:
        model(**batch).loss.backward()
    reasons = set(on_host(prof).values())
    assert reasons == {
        "no engine computes in float64 (the widest is fp32): convert to float32"
    }  # fmt: skip
