"""Latency: the order of the runs, the arithmetic of the spread, the calls; never how fast this machine is."""

from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from momify.errors import MomifyError
from momify.measure.latency import Timing, measure_latency
from momify.model.outputs import CACHE

MakeGpt2 = Callable[..., GPT2LMHeadModel]


class Recorder(nn.Module):
    """Stands for a model: writes down each call as (name, tokens, whether there was a cache)."""

    def __init__(self, name: str, calls: list) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.config = SimpleNamespace(vocab_size=7, max_position_embeddings=20)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, input_ids: torch.Tensor, **given: object) -> SimpleNamespace:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.calls.append((self.name, input_ids.shape[1], given.get(CACHE) is not None))
        return SimpleNamespace(logits=torch.zeros(input_ids.shape[0], 1, 7), **{CACHE: object()})


def ticking() -> Callable[[], float]:
    """A clock on which the interval before look i lasts i seconds."""
    looks: Iterator[int] = count()
    total = 0.0

    def look() -> float:
        nonlocal total
        total += next(looks)
        return total

    return look


def test_models_alternate_and_warmup_is_left_out() -> None:
    calls: list = []
    models = {"a": Recorder("a", calls), "b": Recorder("b", calls)}
    found = measure_latency(
        models, torch.zeros(1, 6, dtype=torch.long), Timing(decode=2, rounds=2, warmup=1), ticking()
    )
    one = [(6, False), (1, True), (1, True)]
    assert calls == [(name, *call) for _ in range(3) for name in "ab" for call in one]
    # Three looks a round: a takes (1, 2), (7, 8), (13, 14) seconds, b (4, 5), (10, 11), (16, 17).
    a, b = found.speeds["a"], found.speeds["b"]
    assert (a.prefill.low, a.prefill.high) == pytest.approx((6 / 13, 6 / 7))
    assert a.prefill.median == pytest.approx((6 / 13 + 6 / 7) / 2)
    assert (b.decode.low, b.decode.high) == pytest.approx((2 / 17, 2 / 11))


def test_real_models_decode_with_their_cache(make_gpt2: MakeGpt2) -> None:
    small = make_gpt2(n_layer=2).train()
    found = measure_latency(
        {"dense": make_gpt2(), "small": small}, torch.zeros(2, 8, dtype=torch.long), Timing(4, 3, 1)
    )
    assert list(found.speeds) == ["dense", "small"]
    for speed in found.speeds.values():
        for spread in (speed.prefill, speed.decode):
            assert 0 < spread.low <= spread.median <= spread.high
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", torch.get_num_threads())
    assert small.training
    assert "batch 2, prompt 8 tokens" in found.protocol
    assert found.batch == 2


def test_tokens_of_all_sequences_count() -> None:
    def rate(batch: int) -> float:
        models = {"a": Recorder("a", [])}
        prompts = torch.zeros(batch, 6, dtype=torch.long)
        return measure_latency(models, prompts, Timing(2, 1, 0), ticking()).speeds["a"].prefill.median

    assert rate(5) == pytest.approx(5 * rate(1))


def test_wrong_settings(make_gpt2: MakeGpt2) -> None:
    with pytest.raises(MomifyError, match="rounds 0"):
        Timing(rounds=0)
    with pytest.raises(MomifyError, match="needs 50 positions and dense has 48"):
        measure_latency({"dense": make_gpt2()}, torch.zeros(1, 40, dtype=torch.long), Timing(decode=10))
    with pytest.raises(MomifyError, match="no model"):
        measure_latency({}, torch.zeros(1, 4, dtype=torch.long), Timing())
