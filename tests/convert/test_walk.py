"""convert/walk.py and what is fitted on it: goals against a model without choices, ridge regression in float64."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from momify.convert.routers import Parts, everyone, fit_patch, fit_routers, output_projection, twin
from momify.convert.walk import halves, home_features, walk
from momify.model import MomConfig, MomForCausalLM
from momify.model.half import home_update, normalise


def some(forks, share=0.5):
    """Random tokens of a half-step, the same ones each time."""
    half = forks[0].half
    generator = torch.Generator().manual_seed(2 * half.step + (half.kind == "ffn"))
    return [torch.rand(len(fork.x), generator=generator) < share for fork in forks]


def at_home(model):
    """The same weights in a model without a choice."""
    alone = {"mha_reach": [[0], [1], [2]], "ffn_reach": [[0], [1], [2]], "patch_rank": 0}
    other = MomForCausalLM(MomConfig.from_dict({**model.config.to_dict(), **alone}))
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


def residual(model, tokens):
    """The last residual (n, D) of a model's own forward pass, before the final LayerNorm."""
    kept = []
    hook = model.model.ln_f.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    hook.remove()
    return kept[0].flatten(0, 1)


def test_goals_lead_to_the_residual_of_a_model_without_choices(routed_model, text):
    model, tokens = routed_model(), text()
    behind = {}

    def note(half, forks):
        behind[half.kind, half.step] = torch.cat([fork.x + fork.goal for fork in forks])
        return some(forks)

    walk(model, tokens, note, twin(model))
    static = at_home(model)
    with torch.no_grad():
        hidden = static(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    for step in (0, 1):
        assert torch.allclose(behind["ffn", step], hidden[step + 1].flatten(0, 1), atol=1e-5), step
    assert torch.allclose(behind["ffn", 2], residual(static, tokens), atol=1e-5)


def test_features_through_the_output_projection_are_the_home_s_update(routed_model, text):
    model, tokens = routed_model(), text(4)
    with torch.no_grad():
        x, shared = model.model.begin(tokens)
        for half in halves(model):
            x_hat, projection = normalise(x, shared), output_projection(model, half.kind)
            out = home_features(x_hat, half, shared) @ projection.weight[half.home] + projection.bias[half.home]
            assert torch.allclose(out, home_update(x_hat, half, shared), atol=1e-5), (half.kind, half.step)


def test_the_home_is_fitted_to_the_tokens_that_run_with_a_pull_to_its_own_weights(routed_model, text):
    model, tokens = routed_model(), text()
    parts, seen = Parts(model, twin(model)), {}

    def fit(half, forks):
        skips = some(forks)
        if (half.kind, half.step) == ("ffn", 1):  # behind half-steps where half of the tokens skipped
            runs = torch.cat([~skip for skip in skips])
            x, y = (torch.cat([getattr(f, name) for f in forks])[runs] for name in ("features", "goal"))
            parts.fit(half, forks, skips)
            seen.update(x=x.double().numpy(), y=y.double().numpy(), tokens=len(runs))
        return skips

    walk(model, tokens, fit, parts.before)
    own, now = (output_projection(one, "ffn") for one in (parts.before, model))
    prior = own.weight[1].detach().double().numpy()
    strength = 0.01 * seen["tokens"] * seen["x"].var(axis=0).mean()
    change = Ridge(alpha=strength).fit(seen["x"], seen["y"] - seen["x"] @ prior)
    assert now.weight[1].detach().numpy() == pytest.approx(prior + change.coef_.T, abs=2e-4)
    assert now.bias[1].detach().numpy() == pytest.approx(change.intercept_, abs=2e-4)
    assert np.abs(change.coef_).max() > 0.01
    assert torch.equal(now.weight[0], own.weight[0])


def distance(model, tokens, goal):
    """Mean squared distance of the last residuals, with random tokens skipping, to `goal`."""
    states = walk(model, tokens, lambda half, forks: some(forks))
    return float((torch.cat(states) - goal).square().mean())


def test_aiming_at_the_residual_comes_nearer_to_it_than_patches_of_their_own_modules(routed_model, text):
    tokens, other = text(48), text(16, seed=9)
    found = {}
    for name in ("own", "patches aim", "modules too"):
        model = routed_model()
        parts = Parts(model, twin(model), modules=name == "modules too")

        def fit(half, forks, parts=parts):
            skips = some(forks)
            parts.fit(half, forks, skips)
            return skips

        def own(half, forks, model=model):
            skips = some(forks)
            fit_patch(model, half, forks, skips)
            return skips

        if name == "own":
            walk(model, tokens, own)
        else:
            walk(model, tokens, fit, parts.before, parts.fit_fixed)
        found[name] = [
            distance(model, some_text, residual(at_home(routed_model()), some_text)) for some_text in (tokens, other)
        ]
    for first, second in (("own", "patches aim"), ("patches aim", "modules too")):
        assert all(b < 0.98 * a for a, b in zip(found[first], found[second], strict=True)), found


def test_what_the_fit_changes_and_what_it_leaves(routed_model, text):
    tokens = text()
    model = routed_model()
    before = twin(model)
    assert before.model.mha.qkv.weight is model.model.mha.qkv.weight
    assert before.model.ffn.down.weight is not model.model.ffn.down.weight
    fit_routers(model, tokens, 0.8)
    fixed = model.model.mha.out.weight[2], before.model.mha.out.weight[2]  # its half-step has no choice
    assert not torch.equal(*fixed)
    assert not torch.equal(model.model.ffn.down.weight, before.model.ffn.down.weight)
    model = routed_model()
    fit_routers(model, tokens, 0.8, modules=False)
    assert torch.equal(model.model.mha.out.weight, before.model.mha.out.weight)
    assert torch.equal(model.model.ffn.down.weight, before.model.ffn.down.weight)
    assert not torch.equal(model.model.ffn_patch.weight_out, before.model.ffn_patch.weight_out)


def test_a_module_that_another_half_step_runs_too_is_left_alone(routed_model, text):
    shared = {"ffn_homes": [0, 1, 1], "ffn_reach": [[0, 3], [1, 3], [1, 3]]}
    model = routed_model(**shared)
    before = twin(model)
    fit_routers(model, text(), 0.8)
    assert torch.equal(model.model.ffn.down.weight[1], before.model.ffn.down.weight[1])
    assert not torch.equal(model.model.ffn.down.weight[0], before.model.ffn.down.weight[0])


def test_a_removed_half_layer_s_patch_is_fitted_to_what_routing_leaves(routed_model, text):
    model = routed_model(mha_homes=[0, 1, 3], mha_reach=[[0, 3], [1, 3], [3]])
    before = twin(model)
    fit_routers(model, text(), 0.85)
    row = model.config.patched("mha").index(2)
    assert not torch.equal(model.model.mha_patch.weight_out[row], before.model.mha_patch.weight_out[row])
    assert everyone([]) == []
