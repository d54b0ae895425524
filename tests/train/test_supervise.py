"""train/supervise.py: what the loss is least at, that only routers learn from it, and that they learn what it costs."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from momify.measure.budget import budget_of
from momify.measure.stakes import loss_metrics, stakes
from momify.model import MomConfig, MomForCausalLM
from momify.model.half import home_update, patch_update
from momify.train.supervise import Supervision, expectation_loss

SHAPE = {
    "vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
    "num_mha_modules": 2, "num_ffn_modules": 2, "num_steps": 2, "mha_homes": [0, 1], "ffn_homes": [0, 1],
    "mha_reach": [[0, 2], [1]], "ffn_reach": [[0, 2], [1, 2]], "patch_rank": 2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture
def model() -> MomForCausalLM:
    found = MomForCausalLM(MomConfig(**SHAPE))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "router" not in name and "ln_f" not in name:
                parameter.normal_(std=0.5 if "wte" in name else 0.15)
    return found


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 61, (16, 24), generator=torch.Generator().manual_seed(5))


def test_the_loss_is_least_at_the_logarithm_of_the_mean():
    cost = torch.rand(500, generator=torch.Generator().manual_seed(0)).double() * 3 + 0.5
    best = minimize_scalar(lambda m: float(expectation_loss(torch.full((500,), m).double(), cost.log()))).x
    assert best == pytest.approx(math.log(float(cost.mean())), abs=1e-4)
    assert float(expectation_loss(cost.log(), cost.log())) == pytest.approx(0.0, abs=1e-12)


def test_far_too_dear_costs_pull_no_harder_than_eight_times():
    said = torch.zeros(3, requires_grad=True)
    expectation_loss(said, torch.tensor([math.log(4.0), math.log(80.0), math.log(8e6)])).backward()
    assert (-3 * said.grad).tolist() == pytest.approx([3.0, 7.0, 7.0], rel=1e-5)


def test_only_routers_learn_and_all_of_them_get_a_gradient(model, ids):
    supervision = Supervision(loss_metrics(model, ids), budget_of(model.config, 24).savings)
    lesson = supervision.draw()
    assert len(lesson.places) == 1
    model(input_ids=ids, use_cache=False, observe=lesson)
    lesson.loss().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"model.{kind}_router.{part}" for kind in ("mha", "ffn") for part in ("weight", "bias")}


def test_checkpointed_steps_teach_the_same(model, ids):
    supervision = Supervision(loss_metrics(model, ids), budget_of(model.config, 24).savings)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(2)
        lesson = supervision.draw()
        out = model(input_ids=ids, labels=ids, use_cache=False, observe=lesson)
        (out.loss + lesson.loss()).backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "_router.weight" in n]))
    assert torch.allclose(*gradients, atol=1e-7)
    assert gradients[0].abs().max() > 1e-3


def test_routers_learn_what_skipping_costs(model, ids):
    budget = budget_of(model.config, 24)
    supervision = Supervision(loss_metrics(model, ids), budget.savings)
    routers = [parameter for name, parameter in model.named_parameters() if "_router." in name]
    optimizer = torch.optim.Adam(routers, lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        lesson = supervision.draw()
        model(input_ids=ids, use_cache=False, observe=lesson)
        lesson.loss().backward()
        optimizer.step()
    said, true = {}, {}

    def look(sight):
        if sight.router is None:
            return
        place = sight.half.kind, sight.half.step
        change = patch_update(sight.x_hat, sight.half, sight.shared) - home_update(
            sight.x_hat, sight.half, sight.shared
        )
        true[place] = stakes(change, sight.x, supervision.metrics[place]) / budget.savings[sight.half.kind]
        said[place] = (sight.x_hat @ sight.router.weight + sight.router.bias)[:, sight.half.home]

    with torch.no_grad():
        model(input_ids=ids, use_cache=False, observe=look)
    for place in supervision.metrics:
        assert float(said[place].exp().mean()) == pytest.approx(float(true[place].mean()), rel=0.25)
        assert float(torch.corrcoef(torch.stack([said[place], true[place].log()]))[0, 1]) > 0.3
