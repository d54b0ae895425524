"""convert/scores.py: each classic measure against transformers' GPT-2, or a count by hand."""

import pytest
import torch

from momify.convert.importance import measure_importance
from momify.convert.scores import half_layer_scores


@torch.no_grad()
def influences(model, text) -> list[float]:
    """1 - cos of what goes into and comes out of each residual addition, by transformers' own blocks."""
    x, found = model.transformer.wte(text) + model.transformer.wpe(torch.arange(text.shape[1])), []
    for block in model.transformer.h:
        for update in (block.attn(block.ln_1(x))[0], None):
            update = block.mlp(block.ln_2(x)) if update is None else update
            cos = (x * (x + update)).sum(-1) / (x.norm(dim=-1) * (x + update).norm(dim=-1))
            found.append(float(1 - cos.mean()))
            x = x + update
    return found


def test_cosine_is_the_mean_over_tokens_by_transformers_blocks(make_gpt2, network_of):
    model = make_gpt2(n_layer=3)
    text = torch.randint(0, 61, (5, 12), generator=torch.Generator().manual_seed(0))
    scores = half_layer_scores(network_of(model), text.split(2), (1, 1), "cosine")
    assert scores == pytest.approx(influences(model, text), abs=1e-6)
    assert max(scores) > 1.5 * min(scores)


def test_magnitude_is_the_norm_of_the_matrices_with_the_layer_norm_in_them(make_gpt2, network_of):
    model = make_gpt2(n_layer=2)
    block = model.transformer.h[1]
    with torch.no_grad():
        block.ln_2.weight.copy_(torch.linspace(0.5, 3.0, 32))
    up, down = (block.ln_2.weight[:, None] * block.mlp.c_fc.weight).detach(), block.mlp.c_proj.weight.detach()
    scores = half_layer_scores(network_of(model), [], (1, 1), "magnitude")
    assert scores[3] == pytest.approx(float((up.square().sum() + down.square().sum()).sqrt()), rel=1e-6)
    qkv = (model.transformer.h[0].ln_1.weight[:, None] * model.transformer.h[0].attn.c_attn.weight).detach()
    out = model.transformer.h[0].attn.c_proj.weight.detach()
    assert scores[0] == pytest.approx(float((qkv.square().sum() + out.square().sum()).sqrt()), rel=1e-6)


@pytest.mark.parametrize(("quota", "gone"), [(0, []), (1, [3]), (2, [1, 4]), (3, [1, 3, 5]), (6, [0, 1, 2, 3, 4, 5])])
def test_every_other_is_evenly_spaced(make_gpt2, quota, gone, network_of):
    scores = half_layer_scores(network_of(make_gpt2(n_layer=6)), [], (quota, 0), "every_other")
    assert [layer for layer in range(6) if scores[2 * layer] == 0] == gone
    assert all(scores[1::2])


@pytest.mark.parametrize("method", ["cosine", "magnitude", "every_other"])
def test_the_lowest_of_each_kind_go_and_the_loss_is_measured_without_them(make_gpt2, without, method, network_of):
    model = make_gpt2(n_layer=4)
    text = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    network = network_of(model)
    found = measure_importance(network, text, (2, 1), method)
    scores = half_layer_scores(network, [text], (2, 1), method)
    gone = {(removal.kind, removal.layer) for removal in found.removals}
    for offset, kind, quota in ((0, "mha", 2), (1, "ffn", 1)):
        lowest = sorted(range(4), key=lambda layer: (scores[2 * layer + offset], layer))[:quota]
        assert {layer for k, layer in gone if k == kind} == set(lowest)
    with torch.no_grad():
        loss = without(model, sorted(gone))(input_ids=text, labels=text).loss.item()
    assert found.removals[-1].loss == pytest.approx(loss, abs=2e-6)
    assert found.evaluations == 2
