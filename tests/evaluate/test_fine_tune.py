"""evaluate/fine_tune.py: the loop's arithmetic, its fairness and its refusal of what is not finite."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from momify.errors import MomifyError
from momify.evaluate.batches import Batch, pad
from momify.evaluate.classifier import make_classifier
from momify.evaluate.contestant import Contestant
from momify.evaluate.fine_tune import FineTuning, fine_tune, set_dropout

ROWS = [[5, 9, 200, 31], [7, 8], [44, 3, 17], [250, 12, 6, 1]]
PLAIN = FineTuning(learning_rate=1e-2, epochs=1, batch_size=4, dropout=0.0)


def loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return F.cross_entropy(logits, batch.labels, reduction="sum")


def batch(places: list[int]) -> Batch:
    ids, mask = pad([ROWS[place] for place in places], 0)
    return Batch(ids, mask, torch.tensor([place % 2 for place in places]))


def trained(one: Contestant, steps: list[list[Batch]], settings: FineTuning = PLAIN) -> torch.nn.Module:
    model = make_classifier(one.load(), 2, 0, seed=0)
    fine_tune(model, steps, len(steps), loss, settings, lambda pieces: None)
    return model


def test_micro_batches_of_any_sizes_are_one_step(dense: Contestant) -> None:
    whole = trained(dense, [[batch([0, 1, 2, 3])]] * 3)
    parts = trained(dense, [[batch([0]), batch([1, 2, 3])]] * 3)
    found = batch([0, 1, 2, 3])
    logits = [m(input_ids=found.input_ids, attention_mask=found.attention_mask).logits for m in (whole, parts)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    other = trained(dense, [[batch([0, 1, 2])]] * 3)(input_ids=found.input_ids, attention_mask=found.attention_mask)
    assert (logits[0] - other.logits).abs().max() > 1e-2
    assert not whole.training


@pytest.mark.parametrize("which", ["dense", "mom"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_few_examples_are_learned(which: str, precision: str, request: pytest.FixtureRequest) -> None:
    one = request.getfixturevalue(which)
    settings = FineTuning(learning_rate=3e-3, epochs=1, batch_size=4, dropout=0.1, precision=precision)
    model = trained(one, [[batch([0, 1, 2, 3])]] * 40, settings)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    found = batch([0, 1, 2, 3])
    logits = model(input_ids=found.input_ids, attention_mask=found.attention_mask).logits
    assert logits.argmax(dim=1).tolist() == found.labels.tolist()


def test_dropout_is_the_same_for_both_whatever_their_configs_say(dense: Contestant, mom: Contestant) -> None:
    for one in (dense, mom):
        model = make_classifier(one.load(), 2, 0, seed=0)
        found = batch([0, 1])
        model.train()
        for share, same in ((0.5, False), (0.0, True)):
            set_dropout(model, share)
            first, second = (model(found.input_ids, attention_mask=found.attention_mask).logits for _ in range(2))
            assert torch.equal(first, second) == same


def test_what_is_not_finite_ends_it(dense: Contestant) -> None:
    def broken(model: torch.nn.Module, batch: Batch) -> Tensor:
        return loss(model, batch) * float("nan")

    model = make_classifier(dense.load(), 2, 0, seed=0)
    with pytest.raises(MomifyError, match=r"lost its way at step 1 of 2 .*lower eval\.learning_rate \(0\.01\)"):
        fine_tune(model, [[batch([0])]] * 2, 2, broken, PLAIN, lambda pieces: None)
    assert all(p.isfinite().all() for p in model.parameters())
