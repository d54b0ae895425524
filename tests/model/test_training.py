"""What training relies on: losses, gradients for every parameter, checkpointing, the routers' gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from momify.model.outputs import CACHE


def all_gradients(model: Any, ids: Tensor, seed: int = 3) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def test_loss_equals_the_hand_computed_one(make_mom, token_ids) -> None:
    model = make_mom()
    labels = token_ids.clone()
    labels[0, :6] = -100
    out = model(token_ids, labels=labels)
    log_p = out.logits.double().log_softmax(-1)
    terms = [-log_p[row, t, labels[row, t + 1]] for row in range(3) for t in range(10) if labels[row, t + 1] != -100]
    assert len(terms) == 25
    assert out.loss.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)
    scaled = model(token_ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    assert scaled.item() == pytest.approx(torch.stack(terms).sum().item() / 50, abs=1e-5)


@pytest.mark.parametrize("skipped_keys", ["home", "masked"])
@pytest.mark.parametrize("router_hidden", [0, 8])
def test_exploring_gives_every_parameter_a_gradient(make_mom, token_ids, skipped_keys, router_hidden) -> None:
    model = make_mom(router_explore=0.5, router_hidden=router_hidden, skipped_keys=skipped_keys).train()
    found = all_gradients(model, token_ids)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(torch.isfinite(g).all() for g in found.values())
    for kind in ("mha", "ffn"):
        for step in range(4):
            assert found[f"model.{kind}_router.bias"][step].abs().sum() > 0, f"{kind} router of step {step}"


def test_modules_that_nobody_chose_get_a_gradient_of_zero(make_mom, token_ids) -> None:
    model = make_mom(mha_reach=[[0]] * 4, mha_homes=[0] * 4).train()
    grad = all_gradients(model, token_ids)["model.mha.qkv.weight"]
    assert grad[0].abs().sum() > 0
    assert torch.equal(grad[1:], torch.zeros_like(grad[1:]))


def test_several_modules_train_the_routers_without_exploring(make_mom, token_ids) -> None:
    model = make_mom(modules_per_token=2).train()
    found = all_gradients(model, token_ids)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["model.ffn_router.weight"].abs().sum() > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"router_explore": 0.5, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
        {"router_explore": 0.5, "skipped_keys": "masked"},
        {"modules_per_token": 2},
        {"mha_reach": [[0], [3], [1], [2]], "mha_homes": [0, 3, 1, 2]},
    ],
    ids=str,
)
def test_checkpointing_gives_equal_gradients(make_mom, token_ids, changes) -> None:
    model = make_mom(**changes).train()
    plain = all_gradients(model, token_ids)
    model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing
    kept = all_gradients(model, token_ids)
    assert plain.keys() == kept.keys()
    for name in plain:  # another draw of what is dropped or explored moves them by more than 1e-2
        torch.testing.assert_close(kept[name], plain[name], rtol=1e-5, atol=1e-6, msg=name)
    out = model(token_ids, use_cache=True)
    assert getattr(out, CACHE) is None, "steps run twice under checkpointing, a cache would grow twice"


def test_checkpointing_refuses_earlier_keys(make_mom, token_ids) -> None:
    model = make_mom()
    past = getattr(model(token_ids[:, :4]), CACHE)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="past_key_values holds keys, which a training that checkpoints cannot use"):
        model(token_ids[:, 4:], past_key_values=past)


def test_router_logits_carry_a_gradient_through_checkpointing(make_mom, token_ids) -> None:
    model = make_mom().train()
    model.gradient_checkpointing_enable()
    out = model(token_ids, output_router_logits=True)
    sum(logits.softmax(-1)[:, 0].mean() for logits in out.router_logits).backward()
    assert model.model.ffn_router.weight.grad.abs().sum() > 0


def test_exploring_and_dropout_happen_in_training_only(make_mom, token_ids) -> None:
    model = make_mom(router_explore=1.0, resid_pdrop=0.3)
    assert torch.equal(model(token_ids).logits, model(token_ids).logits)
    assert model(token_ids, output_router_logits=True).routing[0].modules.shape == (33, 1)
    model.train()
    assert model(token_ids, output_router_logits=True).routing[0].modules.shape == (33, 2)
    model.config.router_explore = 0.0
    assert not torch.equal(model(token_ids).logits, model(token_ids).logits), "dropout"


@pytest.mark.parametrize("kind", ["mha", "ffn"])
def test_router_gradient_of_a_model_is_the_finite_difference(make_mom, kind) -> None:
    """One step, one token many times: the mean gradient of the router against losses with the choice forced."""
    other = "ffn" if kind == "mha" else "mha"
    shape = {
        "num_steps": 1, "num_mha_modules": 2, "num_ffn_modules": 2, f"{other}_reach": [[0]], f"{other}_homes": [0],
        f"{kind}_homes": [1], "router_explore": 1.0, "tie_word_embeddings": False,
    }  # fmt: skip
    model = make_mom(**shape).double()
    router = getattr(model.model, f"{kind}_router")
    draws, target = 20_000, torch.tensor([5])

    @torch.no_grad()
    def forced(choice: int) -> Tensor:
        bias = router.bias.clone()
        router.bias.copy_(F.one_hot(torch.tensor([choice]), 3) * 100.0)
        loss = F.cross_entropy(model(target[None]).logits[0], target)
        router.bias.copy_(bias)
        return loss

    logits = model(target[None], output_router_logits=True).router_logits[0][0].detach()
    best, losses = int(logits.argmax()), [forced(choice) for choice in range(3)]
    expected = torch.zeros(3, dtype=torch.float64)
    for rival in {0, 1, 2} - {best}:
        m = torch.sigmoid(logits[best] - logits[rival])
        slope = 0.5 * m * (1 - m) * (losses[best] - losses[rival])
        expected[best] += slope
        expected[rival] -= slope
    model.train()
    out = model(target.expand(draws, 1))
    (found,) = torch.autograd.grad(F.cross_entropy(out.logits[:, 0], target.expand(draws)), router.bias)
    assert (found[0] - expected).abs().max() < 0.03 * expected.abs().max() + 2e-3
    assert expected.abs().max() > 0.02
