"""Use of the modules against counting the records token by token, and with biases that force a routing."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import GPT2LMHeadModel

from momify.errors import MomifyError
from momify.measure.routing import collect
from momify.model import MomForCausalLM

MakeMom = Callable[..., MomForCausalLM]
MIXED = {
    "mha_homes": [0, 1, 3, 2], "mha_reach": [[0], [0, 1, 2, 3], [3], [2, 3]],
    "ffn_homes": [4, 1, 2, 3], "ffn_reach": [[0, 1, 2, 3, 4], [1, 2], [2, 4], [3]],
}  # fmt: skip


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("picks", [1, 2])
def test_shares_are_counted(make_mom: MakeMom, picks: int, rank: int) -> None:
    model = make_mom(**MIXED, modules_per_token=picks, patch_rank=rank)
    batches = [torch.randint(0, 61, (2, 11)), torch.randint(0, 61, (1, 7))]
    seen: Counter = Counter()
    with torch.no_grad():
        for ids in batches:
            for record in model(ids, output_router_logits=True).routing:
                seen.update((record.step, record.kind, choice) for choice in record.modules.flatten().tolist())

    use = collect(model, batches)
    assert use.tokens == 29
    assert sum(count for place, count in seen.items() if place[:2] == (2, "mha")) == (29 if rank else 0)
    assert [(half.step, half.kind) for half in use.steps] == [(s, k) for s in range(4) for k in ("mha", "ffn")]
    for half in use.steps:
        assert half.patched == (rank > 0 and len(half.shares) - 1 in MIXED[f"{half.kind}_reach"][half.step])
        if (half.step, half.kind) == (2, "mha"):  # cannot run, and only with a patch is there a record of it
            assert half.shares == (0, 0, 0, 1)
            continue
        size = 3 if half.kind == "mha" else 4
        counts = [seen[half.step, half.kind, choice] for choice in range(size + 1)]
        assert half.shares == pytest.approx([count / 29 for count in counts])
        odds = [count / sum(counts) for count in counts if count]
        assert half.entropy == pytest.approx(-sum(p * math.log2(p) for p in odds), abs=1e-9)
        assert half.skip_share == half.shares[-1]


def force(model: MomForCausalLM, mha: list[int], ffn: list[int]) -> MomForCausalLM:
    """Send all tokens of step s to module mha[s] and ffn[s]."""
    with torch.no_grad():
        for router, wanted in ((model.model.mha_router, mha), (model.model.ffn_router, ffn)):
            router.weight.zero_()
            router.bias.zero_()
            for step, choice in enumerate(wanted):
                router.bias[step, choice] = 9.0
    return model


def test_loads_dead_modules_and_imbalance(make_mom: MakeMom) -> None:
    model = force(make_mom(), mha=[0, 2, 3, 2], ffn=[4, 4, 4, 4])
    use = collect(model, [torch.randint(0, 61, (2, 5))])
    assert use.mha.loads == pytest.approx((1 / 3, 0, 2 / 3))
    assert use.mha.dead == (1,)
    assert use.mha.imbalance == pytest.approx(2 / 3 * 3)
    assert use.ffn.loads == (0, 0, 0, 0)
    assert use.ffn.dead == (0, 1, 2, 3)
    assert use.ffn.imbalance == 0
    assert [half.entropy for half in use.steps] == [0] * 8
    assert [half.skip_share for half in use.steps if half.kind == "ffn"] == [1] * 4


def test_even_use_has_imbalance_one(make_mom: MakeMom) -> None:
    model = force(make_mom(num_steps=3), mha=[0, 1, 2], ffn=[0, 1, 2])
    assert collect(model, [torch.zeros(1, 4, dtype=torch.long)]).mha.imbalance == pytest.approx(1)


def test_an_exploring_router_is_still_and_stays_in_training(make_mom: MakeMom) -> None:
    model = make_mom(router_explore=1.0).train()
    ids = [torch.randint(0, 61, (2, 11))]
    assert collect(model, ids) == collect(model, ids)
    assert sum(collect(model, ids).steps[0].shares) == pytest.approx(1)  # two picks a token where it explores
    assert model.training


def test_nothing_to_look_at(make_mom: MakeMom, make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    with pytest.raises(MomifyError, match="at least one batch"):
        collect(make_mom(), [])
    with pytest.raises(MomifyError, match="model_type 'gpt2'"):
        collect(make_gpt2(), [torch.zeros(1, 4, dtype=torch.long)])
