"""evaluate/glue.py: a task from files to score, the same from the same seed, with a protocol that says it all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from momify.errors import MomifyError
from momify.evaluate.contestant import Contestant
from momify.evaluate.fine_tune import FineTuning
from momify.evaluate.glue import Glue, _Reader
from momify.evaluate.glue_data import Example, GlueData, read_glue
from momify.evaluate.glue_tasks import GLUE
from momify.evaluate.split import Split
from momify.evaluate.task import Turn
from momify.model import MomForSequenceClassification

from .conftest import Write

FAST = FineTuning(learning_rate=3e-3, epochs=10, batch_size=8, dropout=0.0)
ONCE = FineTuning(learning_rate=1e-3, epochs=1, batch_size=8)


def glue(name: str, folder: Path, settings: FineTuning = ONCE, **more: int) -> Glue:
    return Glue(GLUE[name], read_glue(GLUE[name], folder), settings, **more)


@pytest.mark.parametrize("which", ["dense", "mom"])
def test_what_can_be_learned_is_learned(which: str, write_glue: Write, request: pytest.FixtureRequest) -> None:
    task = glue("sst2", write_glue("sst2", train=48, dev=16), FAST)
    score = task.score(request.getfixturevalue(which), Turn(seed=0))
    assert score.metrics["accuracy"] > 90


@pytest.mark.parametrize("name", GLUE)
def test_every_task_is_scored_with_all_its_metrics(name: str, write_glue: Write, dense: Contestant) -> None:
    task, done = glue(name, write_glue(name)), []
    score = task.score(dense, Turn(0, done.append))
    assert tuple(score.metrics) == task.shown
    assert sum(done) == task.work(dense)
    for part in ("dev set: 12", "trained on 24;", "learning rate 0.001", "epochs 1", "batch 8", "max length 64"):
        assert part in score.protocol


def test_a_seed_decides_everything(write_glue: Write, mom: Contestant) -> None:
    task = glue("stsb", write_glue("stsb"))
    first = task.score(mom, Turn(3))
    torch.manual_seed(99)
    assert task.score(mom, Turn(3)).metrics == first.metrics != task.score(mom, Turn(4)).metrics


def test_the_key_changes_with_whatever_changes_the_number(
    write_glue: Write, dense: Contestant, mom: Contestant
) -> None:
    folder = write_glue("rte", train=40)
    task = glue("rte", folder)
    others = [
        task.key(mom),
        glue("rte", folder, FAST).key(dense),
        glue("rte", folder, max_length=20).key(dense),
        Glue(GLUE["rte"], read_glue(GLUE["rte"], folder, limit=5), ONCE).key(dense),
    ]
    assert task.key(dense) == glue("rte", folder).key(dense)
    assert all(key != task.key(dense) for key in others)


def test_pairs_are_cut_to_the_length_and_keep_both_sentences(write_glue: Write, dense: Contestant) -> None:
    data = read_glue(GLUE["rte"], write_glue("rte"))
    found = _Reader(GLUE["rte"], dense.tokenizer, 16).read(data.train)
    line_feed = dense.tokenizer("\n")["input_ids"][0]
    assert max(found.lengths) == 16
    assert all(row.count(line_feed) == 1 and row[-1] != line_feed for row in found.rows)
    whole = _Reader(GLUE["rte"], dense.tokenizer, 500).read(data.train)
    first = data.train.examples[0].texts
    assert dense.tokenizer.decode(whole.rows[0]) == f"{first[0]}\n{first[1]}"


def test_constant_predictions_are_told(write_glue: Write, dense: Contestant) -> None:
    task = glue("stsb", write_glue("stsb"))

    def load() -> torch.nn.Module:
        model = dense.load()
        model.transformer.ln_f.weight.data.zero_()
        model.transformer.ln_f.bias.data.zero_()
        model.transformer.ln_f.requires_grad_(False)
        return model

    score = task.score(Contestant("source", "3", load, dense.tokenizer), Turn(0))
    assert score.metrics["pearson"] == 0.0
    assert "not defined" in score.note


def test_a_token_beyond_the_vocabulary_is_told_before_anything_is_learned(
    tokenizer: PreTrainedTokenizerFast, make_gpt2: Callable[..., GPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only a set to score on has one."""
    monkeypatch.setattr("momify.evaluate.glue.fine_tune", lambda *rest: pytest.fail("it learns"))
    train = Split(tuple(Example((text,), label) for label, text in enumerate(("a b", "b a"))), 2)
    task = Glue(GLUE["sst2"], GlueData(train, {"": Split((Example(("the cat",), 0),), 1)}), ONCE)
    entries = 1 + max(tokenizer("a b b a")["input_ids"])
    one = Contestant("mom", "1", lambda: make_gpt2(vocab_size=entries), tokenizer)
    with pytest.raises(MomifyError, match=f"does not fit the model's {entries} entries"):
        task.score(one, Turn(0))


def test_a_kept_head_gives_the_same_predictions(write_glue: Write, mom: Contestant, tmp_path: Path) -> None:
    task = glue("wnli", write_glue("wnli"))
    score = task.score(mom, Turn(0, keep=tmp_path / "head"))
    model = MomForSequenceClassification.from_pretrained(tmp_path / "head").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "head")
    dev = _Reader(GLUE["wnli"], tokenizer, 64).read(task.data.dev[""])
    batch = dev.batch(range(12))
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    right = (logits.argmax(dim=1) == batch.labels).float().mean().item()
    assert score.metrics["accuracy"] == pytest.approx(100 * right)
