"""evaluate/ppl.py: a kept number is used again for the same weights, text and protocol, and for no others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2LMHeadModel

from momify.data.blocks import TokenData
from momify.data.tokenizer import train_tokenizer
from momify.errors import MomifyError
from momify.evaluate.perplexity import Protocol, perplexity
from momify.evaluate.ppl import Contestant, PplSettings, score

TOKENIZER = train_tokenizer(["the cat sat on the mat, the hat and the rat\n" * 20], 265)


@pytest.fixture
def model(make_gpt2: Callable[..., GPT2LMHeadModel]) -> GPT2LMHeadModel:
    return make_gpt2(vocab_size=265, n_positions=16)


@pytest.fixture
def settings() -> PplSettings:
    tokens = np.random.default_rng(0).integers(1, 265, 100).astype(np.uint16)
    return PplSettings(TokenData(tokens, tokens, 16, "a" * 32), 16, 16)


def test_scores_are_kept_and_used_again(tmp_path: Path, model: GPT2LMHeadModel, settings: PplSettings) -> None:
    loads = []

    def load() -> GPT2LMHeadModel:
        loads.append(1)
        return model

    path = tmp_path / "ppl.json"
    first = score([Contestant("source", "1", load)], TOKENIZER, settings, path)
    expected = perplexity(model, settings.data.valid_tensor(), Protocol(16, 16))
    assert first["source"].loss == pytest.approx(expected.loss, rel=1e-6)
    assert first["source"].bits_per_byte > 0
    assert score([Contestant("source", "1", load)], TOKENIZER, settings, path) == first
    assert len(loads) == 1
    for other in (replace(settings, stride=8), replace(settings, limit=50)):
        score([Contestant("source", "1", load)], TOKENIZER, other, path)
    score([Contestant("source", "2", load)], TOKENIZER, settings, path)
    assert len(loads) == 4


def test_a_killed_evaluation_goes_on_with_the_next(
    tmp_path: Path, model: GPT2LMHeadModel, settings: PplSettings
) -> None:
    def killed() -> GPT2LMHeadModel:
        raise KeyboardInterrupt

    path = tmp_path / "ppl.json"
    with pytest.raises(KeyboardInterrupt):
        score([Contestant("source", "1", lambda: model), Contestant("mom", "2", killed)], TOKENIZER, settings, path)
    assert list(json.loads(path.read_text())["models"]) == ["source"]
    both = score([Contestant("source", "1", killed), Contestant("mom", "2", lambda: model)], TOKENIZER, settings, path)
    assert both["mom"].loss == both["source"].loss


def test_damaged_results_are_named(tmp_path: Path, settings: PplSettings) -> None:
    (tmp_path / "ppl.json").write_text("[]")
    with pytest.raises(MomifyError, match=r"ppl\.json is not a result file"):
        score([], TOKENIZER, settings, tmp_path / "ppl.json")
