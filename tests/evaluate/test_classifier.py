"""evaluate/classifier.py: the body is the run's own, only the head is new, and both kinds look at the same token."""

import pytest
import torch
from transformers import GPT2ForSequenceClassification

from momify.evaluate.batches import pad
from momify.evaluate.classifier import make_classifier
from momify.evaluate.contestant import Contestant
from momify.model import MomForSequenceClassification


@pytest.mark.parametrize("which", ["dense", "mom"])
def test_every_weight_but_the_heads_is_the_models_own(which: str, request: pytest.FixtureRequest) -> None:
    one: Contestant = request.getfixturevalue(which)
    before = {name: p.clone() for name, p in one.load().named_parameters() if not name.startswith("lm_head")}
    found = make_classifier(one.load(), 3, 0, seed=5)
    assert type(found) is (MomForSequenceClassification if which == "mom" else GPT2ForSequenceClassification)
    after = dict(found.named_parameters())
    assert set(after) - set(before) == {"score.weight"}
    assert set(before) <= set(after)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(tensor.device.type == "cpu" for tensor in found.state_dict().values())
    assert after["score.weight"].shape == (3, 32)
    assert 0.01 < after["score.weight"].std() < 0.03


def test_heads_follow_the_seed_alone(dense: Contestant, mom: Contestant) -> None:
    heads = [make_classifier(one.load(), 2, 0, seed).score.weight for one, seed in ((dense, 1), (mom, 1), (mom, 2))]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


@torch.no_grad()
@pytest.mark.parametrize("which", ["dense", "mom"])
def test_a_padded_batch_gives_what_each_row_gives_alone(which: str, request: pytest.FixtureRequest) -> None:
    model = make_classifier(request.getfixturevalue(which).load(), 2, 0, seed=0).eval()
    rows = [[5, 9, 200, 31], [7], [44, 3, 17, 17, 8, 250, 12]]
    ids, mask = pad(rows, 0)
    together = model(input_ids=ids, attention_mask=mask).logits
    for place, row in enumerate(rows):
        alone = model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits
        assert (together[place] - alone[0]).abs().max() < 1e-5


@torch.no_grad()
def test_the_head_reads_the_last_token(mom: Contestant) -> None:
    model = make_classifier(mom.load(), 2, 0, seed=0).eval()
    ids = torch.tensor([[5, 9, 200, 31]])
    x = model.model(input_ids=ids).last_hidden_state  # (1, T, D)
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(found, model.score(x[:, -1]), atol=1e-6)
