"""Patches and step deltas: who has one, what it adds, its gradients, its record; and that a new one does nothing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from momify.model import MomConfig, MomForCausalLM, half_steps

PARTS: dict[str, Any] = {
    "patch_rank": 3, "step_rank": 2,
    "mha_reach": [[1], [3], [1], [0, 1, 3]], "mha_homes": [1, 3, 1, 1],
    "ffn_reach": [[2], [0, 2, 4], [4], [2]], "ffn_homes": [2, 4, 4, 2],
}  # fmt: skip


def small_parts(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters() if "patch" in name or "delta" in name]


def test_who_has_a_part_and_under_which_name(make_mom) -> None:
    config = MomConfig(num_steps=4, num_mha_modules=3, num_ffn_modules=4, **PARTS)
    assert (config.patched("mha"), config.patched("ffn")) == ([1, 3], [1, 2])
    assert (config.adapted("mha"), config.adapted("ffn")) == ([0, 2], [0, 3])
    assert [(h.kind, h.step, h.route, h.slot, h.masks_keys, h.patch, h.delta) for h in half_steps(config)] == [
        ("mha", 0, None, 0, False, None, 0), ("ffn", 0, None, None, False, None, 0),
        ("mha", 1, None, None, False, 0, None), ("ffn", 1, 0, None, False, 0, None),
        ("mha", 2, None, 1, False, None, 1), ("ffn", 2, None, None, False, 1, None),
        ("mha", 3, 0, 2, False, 1, None), ("ffn", 3, None, None, False, None, 1),
    ]  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in make_mom(**PARTS).named_parameters()}
    expected = {
        "mha_patch": (2, 32, 3, 32), "ffn_patch": (2, 32, 3, 32), "mha_delta.qkv": (2, 32, 2, 96),
        "mha_delta.out": (2, 32, 2, 32), "ffn_delta.up": (2, 32, 2, 48), "ffn_delta.down": (2, 48, 2, 32),
    }  # fmt: skip
    for name, (steps, inside, rank, out) in expected.items():
        assert shapes.pop(f"model.{name}.weight_in") == (steps, inside, rank)
        assert shapes.pop(f"model.{name}.weight_out") == (steps, rank, out)
        assert shapes.pop(f"model.{name}.bias") == (steps, out)
    bare = make_mom(**{**PARTS, "patch_rank": 0, "step_rank": 0})
    assert set(shapes) == {name for name, _ in bare.named_parameters()}
    assert bare.model.mha_patch is bare.model.ffn_delta is None
    nobody = make_mom(
        patch_rank=2, step_rank=2, mha_reach=[[0, 1], [1], [2], [0, 2]], ffn_reach=[[i] for i in range(4)]
    )
    assert small_parts(nobody) == [], "nothing skips, and the module that two steps share is fixed at neither"


@torch.no_grad()
def test_new_parts_do_nothing(make_mom, token_ids) -> None:
    bare = make_mom(**{**PARTS, "patch_rank": 0, "step_rank": 0}).double()
    model = MomForCausalLM(MomConfig(**{**bare.config.to_diff_dict(), **PARTS})).double().eval()
    for name in small_parts(model):
        assert model.get_parameter(name).std() == (0 if "weight_in" not in name else pytest.approx(0.02, rel=0.3))
    assert model.load_state_dict(bare.state_dict(), strict=False).missing_keys == small_parts(model)
    torch.testing.assert_close(model(token_ids).logits, bare(token_ids).logits, rtol=0, atol=1e-12)


def gradients(logits: Tensor, ids: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = F.cross_entropy(logits[:-1], ids[1:])
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("changes", [PARTS, {"patch_rank": 3}, {"patch_rank": 3, "skipped_keys": "masked"}], ids=str)
def test_gradients_equal_those_of_a_plain_loop(make_mom, plain_loop, token_ids, changes) -> None:
    model, ids = make_mom(**changes).double(), token_ids[1]
    parameters = {name: p for name, p in model.named_parameters() if "router" not in name}
    ours = gradients(model(ids[None]).logits[0], ids, parameters)
    theirs = gradients(plain_loop(model).logits(ids), ids, parameters)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-10, msg=name)
    assert all(ours[name].abs().max() > 1e-4 for name in small_parts(model))


def test_gradients_of_shares_and_of_routers_are_true(make_mom) -> None:
    """K = 2: what a token's gate on SKIP does to the loss reaches the router, by finite differences."""
    model = make_mom(
        hidden_size=4, num_attention_heads=2, intermediate_size=3, num_steps=2, num_mha_modules=2, num_ffn_modules=2,
        vocab_size=11, modules_per_token=2, router_tau=2.0, patch_rank=2,
    ).double()  # fmt: skip
    names = [name for name, _ in model.named_parameters() if "patch" in name or "router" in name]
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    skips = [(r.modules == r.skip).any().item() for r in model(ids, output_router_logits=True).routing]
    assert all(skips)

    def loss(*tensors: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (ids,)).logits[0]
        return F.cross_entropy(logits[:-1], ids[0, 1:])

    assert torch.autograd.gradcheck(loss, [model.get_parameter(name) for name in names])


def test_an_explorer_gets_the_patch_by_its_share_of_skip(make_mom, plain_loop, token_ids) -> None:
    model = make_mom(patch_rank=3, mha_reach=[[0]] * 4, mha_homes=[0] * 4, router_explore=0.6, router_tau=3.0).double()
    model.train()
    out = model(token_ids[:1], output_router_logits=True)
    drawn = {r.step: (r.modules.tolist(), r.gates.tolist()) for r in out.routing if r.kind == "ffn"}
    mixed = [
        g for modules, gates in drawn.values() for m, g in zip(modules, gates, strict=True) if 4 in m and 0 < g[0] < 1
    ]
    assert len(mixed) > 3

    class Replayed(plain_loop):
        """Takes the picks that were drawn."""

        def _pick(self, kind: str, step: int, x_hat: Tensor) -> dict[int, float]:
            if kind == "mha":
                return super()._pick(kind, step, x_hat)
            gates: dict[int, float] = {}
            for module, gate in zip(*(column.pop(0) for column in drawn[step]), strict=True):
                gates[module] = gates.get(module, 0.0) + gate
            return gates

    assert (Replayed(model).logits(token_ids[0]) - out.logits[0]).abs().max() < 1e-9


@pytest.mark.parametrize("changes", [{}, {"modules_per_token": 2}, {"router_explore": 0.5}], ids=str)
def test_many_tokens_at_once_equal_few(make_mom, changes, monkeypatch) -> None:
    """More than are sorted on the host, by both ways of execution, against rows that are; gradients too."""
    model = make_mom(patch_rank=3, **changes).double()
    ids = torch.randint(1, 61, (4, 24))
    alone = torch.cat([model(row[None]).logits for row in ids]).detach()
    found = []
    for name in ("reference", "grouped"):
        monkeypatch.setenv("MOMIFY_KERNELS", name)
        assert (model.eval()(ids).logits - alone).abs().max() < 1e-9
        model.train().zero_grad()
        torch.manual_seed(1)
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("changes", [PARTS, {"patch_rank": 2, "modules_per_token": 2}], ids=str)
def test_checkpointing_gives_the_same_gradients(make_mom, token_ids, changes) -> None:
    model = make_mom(**changes).train()
    found = []
    for _ in range(2):
        model.zero_grad()
        model(token_ids, labels=token_ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert found[0].keys() == found[1].keys() >= set(small_parts(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_patch_that_nobody_needs_gets_a_gradient_of_zero(make_mom, token_ids) -> None:
    """Else several processes would wait for the one whose tokens all run."""
    model = make_mom(patch_rank=2).train()
    with torch.no_grad():
        for router in (model.model.mha_router, model.model.ffn_router):
            router.bias[:, -1] = -100.0
    model(token_ids, labels=token_ids).loss.backward()
    for name in small_parts(model):
        assert torch.equal(model.get_parameter(name).grad, torch.zeros_like(model.get_parameter(name))), name


@torch.no_grad()
def test_the_record_shows_skip_with_a_patch(make_mom, token_ids) -> None:
    out = make_mom(**PARTS)(token_ids, output_router_logits=True)
    records = {(r.kind, r.step): r for r in out.routing}
    assert len(records) == 8
    assert len(out.router_logits) == 2, "a half-step that can only skip has no router, and no logits"
    assert [place for place, r in records.items() if r.patched] == [("mha", 1), ("ffn", 1), ("ffn", 2), ("mha", 3)]
    for place in (("mha", 1), ("ffn", 2)):
        only = records[place]
        assert (only.rows, only.key_rows, only.patch_rows) == (0, 0, 33)
        assert not only.routed
        assert not only.attended
        assert (only.modules == only.skip).all()
    some = records["mha", 3]
    assert some.patch_rows == some.key_rows == (some.modules == 3).sum() == 33 - some.rows
    assert 0 < some.rows < 33
    assert records["mha", 0].patch_rows == 0
    several = make_mom(patch_rank=1, modules_per_token=2)(token_ids, output_router_logits=True).routing
    assert [r.patch_rows for r in several] == [(r.modules == r.skip).any(1).sum() for r in several]


@torch.no_grad()
def test_lower_precision_stays_close(make_mom, token_ids) -> None:
    model = make_mom(**{**PARTS, "mha_reach": [[1], [3], [1], [1]], "ffn_reach": [[2], [4], [4], [2]]})
    full = model(token_ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(token_ids).logits
    half = model.to(torch.bfloat16)(token_ids).logits
    for logits in (cast, half):
        assert (logits.float() - full).abs().median() < 0.05 * full.std()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch_rank": -1}, "patch_rank is -1; use a whole number of at least 0"),
        ({"step_rank": True}, "step_rank is True"),
        ({"step_rank": 2.0}, "step_rank is 2.0"),
        ({"patch_rank": 65, "hidden_size": 64, "num_attention_heads": 4}, "patch_rank 65 is more than hidden_size 64"),
    ],
    ids=str,
)
def test_mistakes_name_field_value_and_remedy(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        MomConfig(**wrong)
