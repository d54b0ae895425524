"""The forward pass against transformers' GPT-2 and against a plain loop over tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from momify.model.outputs import CACHE

STATIC = [[0], [1], [2], [3]]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_inner": 40},
    {"activation_function": "relu"},
    {"tie_word_embeddings": False},
    {"vocab_size": 67, "n_head": 2},
]


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("reach", [STATIC, None], ids=["static", "routed"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_full_pool_equals_gpt2(make_gpt2, fold_gpt2, token_ids, variant, reach) -> None:
    gpt2 = make_gpt2(**variant)
    model = fold_gpt2(gpt2, mha_reach=reach, ffn_reach=reach)
    ours, theirs = model(token_ids).logits, gpt2(token_ids).logits
    assert theirs.std() > 0.1, "logits too small to tell anything"
    assert difference(ours, theirs) <= 1e-4


@torch.no_grad()
def test_padded_batch_equals_gpt2(make_gpt2, fold_gpt2, token_ids) -> None:
    gpt2 = make_gpt2()
    mask = torch.ones_like(token_ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    theirs = gpt2(token_ids, attention_mask=mask, position_ids=positions).logits
    ours = fold_gpt2(gpt2)(token_ids, attention_mask=mask).logits
    assert difference(ours[mask.bool()], theirs[mask.bool()]) <= 1e-4


def blocks_with_parts(gpt2: Any, ids: Tensor, mha: list[int | None], ffn: list[int | None]) -> Tensor:
    """Logits of GPT-2 with the sublayers of the listed layers, None leaving one out."""
    body = gpt2.transformer
    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    for a, f in zip(mha, ffn, strict=True):
        if a is not None:
            x = x + body.h[a].attn(body.h[a].ln_1(x))[0]
        if f is not None:
            x = x + body.h[f].mlp(body.h[f].ln_2(x))
    return gpt2.lm_head(body.ln_f(x))


@pytest.mark.parametrize(
    ("mha", "ffn"),
    [
        ([0, None, 2, 2], [0, 1, None, 3]),
        ([None, None, 1, None], [None, 3, 3, None]),
        ([None] * 4, [0, 1, 2, 3]),
        ([3, 2, 1, 0], [None] * 4),
        ([0, 0, None, None, 3, 1], [0, None, None, 2, 2, 3]),
    ],
)
@torch.no_grad()
def test_static_steps_equal_gpt2_with_sublayers_left_out(make_gpt2, fold_gpt2, token_ids, mha, ffn) -> None:
    gpt2 = make_gpt2()
    homes = {"mha": [4 if i is None else i for i in mha], "ffn": [4 if i is None else i for i in ffn]}
    changes = {f"{kind}_homes": h for kind, h in homes.items()} | {
        f"{kind}_reach": [[i] for i in h] for kind, h in homes.items()
    }
    model = fold_gpt2(gpt2, num_steps=len(mha), **changes)
    assert difference(model(token_ids).logits, blocks_with_parts(gpt2, token_ids, mha, ffn)) <= 1e-4
    assert not [name for name, _ in model.named_parameters() if "router" in name]


@torch.no_grad()
def test_routers_start_at_home_whatever_the_token(make_gpt2, fold_gpt2, token_ids) -> None:
    gpt2 = make_gpt2()
    homes = [1, 4, 0, 2]  # 4 is SKIP
    model = fold_gpt2(gpt2, mha_homes=homes, ffn_homes=homes, router_hidden=8)
    parts = [None if i == 4 else i for i in homes]
    assert difference(model(token_ids).logits, blocks_with_parts(gpt2, token_ids, parts, parts)) <= 1e-4


ROUTED: list[dict[str, Any]] = [
    {},
    {"skipped_keys": "masked"},
    {"router_hidden": 8, "router_tau": 0.5},
    {"mha_homes": [3, 0, 3, 1], "ffn_homes": [4, 4, 0, 1]},
    {"mha_homes": [3, 0, 3, 1], "skipped_keys": "masked"},
    {"modules_per_token": 2},
    {"modules_per_token": 2, "router_tau": 3.0, "skipped_keys": "masked"},
    {"modules_per_token": 3, "num_ffn_modules": 3},
    {"modules_per_token": 4, "num_ffn_modules": 3},
    {"num_mha_modules": 1, "num_ffn_modules": 1},
    {
        "mha_reach": [[0, 1], [3], [2, 3], [0, 1, 2, 3]],
        "mha_homes": [0, 3, 3, 2],
        "ffn_reach": [[4], [0, 4], [2], [1, 2, 3]],
        "ffn_homes": [4, 0, 2, 3],
    },
    {"modules_per_token": 3, "mha_reach": [[0, 1], [1, 3], [2], [0, 1, 2, 3]], "mha_homes": [0, 3, 2, 3]},
    {"patch_rank": 3},
    {"patch_rank": 3, "skipped_keys": "masked"},
    {"patch_rank": 2, "modules_per_token": 2, "router_tau": 3.0},
    {"patch_rank": 1, "num_mha_modules": 1, "num_ffn_modules": 1, "modules_per_token": 2},
    {
        "patch_rank": 3,
        "step_rank": 2,
        "mha_reach": [[1], [3], [1], [0, 1, 3]],
        "mha_homes": [1, 3, 1, 3],
        "ffn_reach": [[2], [0, 2, 4], [4], [2]],
        "ffn_homes": [2, 4, 4, 2],
    },
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", ROUTED, ids=str)
@torch.no_grad()
def test_routed_forward_equals_a_plain_loop(make_mom, plain_loop, token_ids, changes, implementation) -> None:
    model = make_mom(**changes).double()
    model.set_attn_implementation(implementation)
    loop = plain_loop(model)
    theirs = torch.stack([loop.logits(row) for row in token_ids])
    assert len({str(best) for kind, _, best in loop.picked if kind == "mha"}) > 1, "routing is not mixed"
    assert theirs.std() > 0.1
    assert difference(model(token_ids).logits, theirs) < 1e-9


@torch.no_grad()
def test_loop_finds_tokens_that_skip_in_each_mode(make_mom, plain_loop, token_ids) -> None:
    """The comparison above is about something: some tokens skip attention, others see or do not see their keys."""
    logits = {}
    for mode in ("home", "masked"):
        model = make_mom(skipped_keys=mode).double()
        loop = plain_loop(model)
        logits[mode] = loop.logits(token_ids[0])
        assert any(best == [3] for kind, _, best in loop.picked if kind == "mha")
    assert difference(logits["home"], logits["masked"]) > 1e-3


@pytest.mark.parametrize("skipped_keys", ["home", "masked"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_left_padding_changes_nothing(make_mom, token_ids, skipped_keys, implementation) -> None:
    model = make_mom(skipped_keys=skipped_keys).double()
    model.set_attn_implementation(implementation)
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), token_ids], dim=1)
    mask = (padded != 0).long()
    assert difference(model(padded, attention_mask=mask).logits[:, 5:], model(token_ids).logits) < 1e-9
    right = torch.cat([token_ids, torch.zeros(3, 5, dtype=torch.long)], dim=1)
    shown = model(right, attention_mask=(right != 0).long()).logits[:, :11]
    assert difference(shown, model(token_ids).logits) < 1e-9


@torch.no_grad()
def test_inputs_embeds_positions_and_kept_logits(make_mom, token_ids) -> None:
    model = make_mom()
    full = model(token_ids).logits
    assert difference(model(inputs_embeds=model.model.wte(token_ids)).logits, full) == 0
    assert difference(model(token_ids, position_ids=torch.arange(11)[None]).logits, full) == 0
    assert difference(model(token_ids, position_ids=torch.arange(3, 14)[None]).logits, full) > 1e-3
    assert difference(model(token_ids, logits_to_keep=2).logits, full[:, -2:]) < 1e-5
    assert difference(model(token_ids, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]]) < 1e-5
    assert len(model(token_ids, return_dict=False, use_cache=False)) == 1


@torch.no_grad()
def test_four_dimensional_mask(make_mom, token_ids) -> None:
    model = make_mom(skipped_keys="masked")
    causal = torch.ones(11, 11).tril().bool().expand(3, 1, 11, 11)
    assert difference(model(token_ids, attention_mask=causal).logits, model(token_ids).logits) < 1e-5


@torch.no_grad()
def test_hidden_states_and_attentions(make_gpt2, fold_gpt2, token_ids) -> None:
    gpt2 = make_gpt2()
    model = fold_gpt2(gpt2)
    for each in (gpt2, model):
        each.set_attn_implementation("eager")
    theirs = gpt2(token_ids, output_hidden_states=True, output_attentions=True)
    ours = model(token_ids, output_hidden_states=True, output_attentions=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 5
    for a, b in zip(ours.hidden_states + ours.attentions, theirs.hidden_states + theirs.attentions, strict=True):
        assert difference(a, b) < 1e-4
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="eager"):
        model(token_ids, output_attentions=True)


@torch.no_grad()
def test_routing_record(make_mom, token_ids) -> None:
    reach = [[0, 1, 2, 3], [3], [1], [0, 3]]
    model = make_mom(mha_reach=reach, mha_homes=[0, 3, 1, 3], ffn_reach=[[0], [4], [1, 2], [4]], ffn_homes=[0, 4, 1, 4])
    out = model(token_ids, output_router_logits=True)
    assert [(r.kind, r.step) for r in out.routing] == [
        ("mha", 0), ("ffn", 0), ("mha", 2), ("ffn", 2), ("mha", 3)
    ]  # fmt: skip
    assert [r.routed for r in out.routing] == [True, False, False, True, True]
    routed = [r for r in out.routing if r.routed]
    for record, logits in zip(routed, out.router_logits, strict=True):
        skip = 3 if record.kind == "mha" else 4
        assert logits.shape == (33, skip + 1)
        assert torch.equal(record.modules[:, 0], logits.argmax(1))
        assert record.rows == (record.modules != skip).sum()
        closed = [i for i in range(skip + 1) if i not in model.config.reach(record.kind)[record.step]]
        assert torch.isinf(logits[:, closed]).all()
        assert torch.isfinite(logits).sum() == 33 * (skip + 1 - len(closed))
    first, static, last = out.routing[0], out.routing[2], out.routing[4]
    assert first.key_rows == (first.modules == 3).sum() > 0
    assert last.key_rows == 0, "home is SKIP: its skipping tokens are masked, not computed"
    assert (static.modules == 1).all()
    assert static.rows == 33
    assert model(token_ids).routing is None
    assert model(token_ids).router_logits is None


def silence(model: Any, kinds: tuple[str, ...]) -> None:
    """Make every token choose SKIP."""
    with torch.no_grad():
        for kind in kinds:
            router = getattr(model.model, f"{kind}_router")
            router.weight.zero_()
            router.bias.zero_()
            router.bias[:, -1] = 1.0


@pytest.mark.parametrize("skipped_keys", ["home", "masked"])
def test_a_batch_in_which_every_token_skips(make_mom, token_ids, skipped_keys) -> None:
    model = make_mom(skipped_keys=skipped_keys)
    silence(model, ("mha", "ffn"))
    out = model(token_ids, labels=token_ids, output_router_logits=True)
    body = model.model
    plain = model.lm_head(body.ln_f(body.wte(token_ids) + body.wpe(torch.arange(11))))
    assert difference(out.logits, plain) < 1e-5
    assert all(r.rows == 0 and not r.attended for r in out.routing)
    cached = model(token_ids[:, :5], use_cache=True)
    later = model(token_ids[:, 5:], **{CACHE: getattr(cached, CACHE)}, output_router_logits=True)
    assert difference(later.logits, plain[:, 5:]) < 1e-5
    expected = 18 if skipped_keys == "home" else 0
    assert {r.key_rows for r in later.routing if r.kind == "mha"} == {expected}
    out.loss.backward()
    model.train()
    model.config.router_explore = 1.0
    model(token_ids, labels=token_ids).loss.backward()
    assert torch.isfinite(body.mha.qkv.weight.grad).all()


@torch.no_grad()
def test_bfloat16_stays_close_to_float32(make_mom, token_ids) -> None:
    model = make_mom(mha_reach=[[0], [1], [2], [0]], mha_homes=[0, 1, 2, 0])
    full = model(token_ids).logits
    model.to(torch.bfloat16)
    half = model(token_ids)
    assert half.logits.dtype == torch.bfloat16
    # 8 bits of mantissa through 8 half-steps; a wrong module moves logits by their own size
    assert (half.logits.float() - full).abs().median() < 0.05 * full.std()


@torch.no_grad()
def test_autocast_keeps_router_logits_in_float32(make_mom, token_ids) -> None:
    model = make_mom()
    plain = model(token_ids, output_router_logits=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(token_ids, output_router_logits=True)
    assert out.router_logits[0].dtype == torch.float32
    assert difference(out.router_logits[0], plain.router_logits[0]) < 1e-5


@torch.no_grad()
def test_tracing_gives_the_same_logits(make_mom, token_ids) -> None:
    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits

    model = make_mom()
    traced = torch.jit.trace(Logits(model), (token_ids,), check_trace=False)
    assert difference(traced(token_ids), model(token_ids).logits) < 1e-5


def test_wrong_inputs_are_refused(make_mom, token_ids) -> None:
    model = make_mom()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(token_ids, inputs_embeds=model.model.wte(token_ids))
    long = torch.ones(2, 49, dtype=torch.long)
    for mask in (None, long, long[:, None, None].expand(2, 1, 49, 49).bool()):
        with pytest.raises(ValueError, match="49 tokens is longer than n_positions 48"):
            model(long, attention_mask=mask)
    with pytest.raises(ValueError, match="49 tokens is longer than n_positions 48"):
        model(long, position_ids=torch.arange(49)[None])


@torch.no_grad()
def test_padding_takes_no_positions(make_mom, token_ids) -> None:
    model = make_mom()
    ids = torch.nn.functional.pad(token_ids, (44, 0))  # 55 tokens of 48 positions, 11 of them text
    padded = model(ids, attention_mask=(ids != 0).long()).logits[:, 44:]
    assert difference(padded, model(token_ids).logits) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"modules_per_token": 2}, {"skipped_keys": "masked"}], ids=str)
@torch.no_grad()
def test_an_empty_batch_gives_empty_logits(make_mom, changes) -> None:
    none = torch.zeros(0, 3, dtype=torch.long)
    assert make_mom(**changes)(none, attention_mask=none).logits.shape == (0, 3, 61)
