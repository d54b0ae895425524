"""The classifier against transformers' GPT-2 classifier."""

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from momify.model import MomForSequenceClassification


def pair(make_gpt2, fold_gpt2, labels: int = 3):
    """GPT-2 with a classification head, and the same taken apart."""
    gpt2 = make_gpt2(pad_token_id=0)
    theirs = GPT2ForSequenceClassification(GPT2Config(**{**gpt2.config.to_dict(), "num_labels": labels})).eval()
    theirs.transformer.load_state_dict(gpt2.transformer.state_dict())
    torch.nn.init.normal_(theirs.score.weight)
    mom = fold_gpt2(gpt2, pad_token_id=0, num_labels=labels)
    ours = MomForSequenceClassification(mom.config).eval()
    ours.model.load_state_dict(mom.model.state_dict())
    ours.score.load_state_dict(theirs.score.state_dict())
    return ours, theirs


@torch.no_grad()
def test_logits_and_loss_equal_gpt2s(make_gpt2, fold_gpt2, token_ids) -> None:
    ours, theirs = pair(make_gpt2, fold_gpt2)
    ids = token_ids.clone()
    ids[1, 8:] = 0
    labels = torch.tensor([2, 0, 1])
    a, b = ours(ids, labels=labels), theirs(ids, labels=labels)
    assert (a.logits - b.logits).abs().max() < 1e-4
    assert a.loss.item() == pytest.approx(b.loss.item(), abs=1e-4)


@torch.no_grad()
def test_regression_has_a_mean_squared_error(make_gpt2, fold_gpt2, token_ids) -> None:
    ours, _ = pair(make_gpt2, fold_gpt2, labels=1)
    targets = torch.tensor([0.5, -1.0, 2.0])
    out = ours(token_ids, labels=targets)
    assert out.logits.shape == (3, 1)
    assert out.loss.item() == pytest.approx(((out.logits[:, 0] - targets) ** 2).mean().item(), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_last_token_that_is_not_padding(make_classifier, token_ids, side) -> None:
    model = make_classifier(pad_token_id=0, num_labels=3).double()
    alone = torch.cat([model(row[None, : 11 - i]).logits for i, row in enumerate(token_ids)])
    ids = torch.zeros(3, 15, dtype=torch.long)
    for i, row in enumerate(token_ids):
        length = 11 - i
        start = {"left": 15 - length, "right": 0, "both": 2}[side]
        ids[i, start : start + length] = row[:length]
    out = model(ids, attention_mask=(ids != 0).long())
    assert (out.logits - alone).abs().max() < 1e-9
    if side == "right":  # causal: without a mask, padding on the right is found by its token
        assert (model(ids).logits - alone).abs().max() < 1e-9


@torch.no_grad()
def test_a_last_token_equal_to_the_padding_token_counts_if_the_mask_says_so(make_classifier, token_ids) -> None:
    """GPT-2 pads with its end-of-text token: the mask tells the two apart."""
    model = make_classifier(pad_token_id=0, num_labels=3)
    ids = token_ids.clone()
    ids[:, -1] = 0
    body = model.model(ids).last_hidden_state[:, -1]
    assert (model(ids, attention_mask=torch.ones_like(ids)).logits - model.score(body)).abs().max() < 1e-5


def test_padding_that_cannot_be_told_is_refused(make_classifier, token_ids) -> None:
    model = make_classifier(num_labels=3)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        model(token_ids)
    assert model(token_ids[:1]).logits.shape == (1, 3)
    embeds = model.model.wte(token_ids)
    with pytest.raises(ValueError, match="give attention_mask"):
        model(inputs_embeds=embeds)
    assert model(inputs_embeds=embeds, attention_mask=torch.ones_like(token_ids)).logits.shape == (3, 3)


def test_router_logits_pass_through(make_classifier, token_ids) -> None:
    out = make_classifier(pad_token_id=0)(token_ids, output_router_logits=True, output_hidden_states=True)
    assert len(out.router_logits) == len(out.routing) == 8
    assert len(out.hidden_states) == 5


def test_neither_input_and_embeddings_whose_padding_no_token_tells(make_classifier, token_ids) -> None:
    model = make_classifier(pad_token_id=0)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="inputs_embeds of several rows do not show what is padding; give attention_"):
        model(inputs_embeds=model.model.wte(token_ids))
