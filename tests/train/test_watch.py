"""train/watch.py: a collapsing router and a rising held-out loss are told once, a healthy run is left alone."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import GPT2LMHeadModel, PreTrainedModel, set_seed

from momify.data.blocks import TokenData
from momify.data.tokenizer import check_same_tokens, train_tokenizer
from momify.errors import MomifyError
from momify.model import MomConfig, MomForCausalLM
from momify.recipe_blocks import TrainBlock
from momify.train import watch
from momify.train.fit import Place, fit
from momify.train.routing_log import use_shares
from momify.train.watch import OverfitWatch, RouterWatch

SHAPE = {"vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
         "num_mha_modules": 2, "num_ffn_modules": 3, "num_steps": 3, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


def watched(config: MomConfig, logs: list[dict[str, list[int]]], unused_steps: int = 30) -> list[str]:
    """What a RouterWatch says of use counts logged at steps 10, 20, ..."""
    said: list[str] = []
    router_watch = RouterWatch(config, said.append, unused_steps)
    for number, counts in enumerate(logs, start=1):
        sums = {f"use/{name}": torch.tensor(count) for name, count in counts.items()}
        router_watch.on_log(None, SimpleNamespace(global_step=10 * number), None, use_shares(sums))
    return said


BALANCED = {"mha/0": [5, 5, 2], "mha/1": [5, 5, 2], "mha/2": [5, 5, 2]}
HOMES = {"mha/0": [12, 0, 0], "mha/1": [0, 12, 0], "mha/2": [12, 0, 0]}  # the start
ALL_ONE = {"mha/0": [12, 0, 0], "mha/1": [12, 0, 0], "mha/2": [12, 0, 0]}
ALL_SKIP = {"mha/0": [0, 0, 12], "mha/1": [0, 0, 12], "mha/2": [0, 0, 12]}


@pytest.mark.parametrize("logs", [BALANCED, HOMES])
def test_healthy_routing_is_left_alone(logs: dict) -> None:
    assert watched(MomConfig(**SHAPE), [logs] * 10) == []


def test_unused_module_is_told_once_after_so_many_steps() -> None:
    only_first = {"mha/0": [12, 0, 1], "mha/1": [12, 0, 1], "mha/2": [12, 0, 1]}
    assert watched(MomConfig(**SHAPE), [BALANCED, *[only_first] * 2]) == []
    said = watched(MomConfig(**SHAPE), [BALANCED, *[only_first] * 10])
    assert len(said) == 1
    assert "router collapse: mha module 1: no token has chosen it for 30 steps" in said[0]


@pytest.mark.parametrize(("logs", "name"), [(ALL_ONE, "mha module 0"), (ALL_SKIP, "mha SKIP")])
def test_one_choice_with_all_tokens_is_told_once(logs: dict, name: str) -> None:
    said = watched(MomConfig(**SHAPE), [logs] * 2)
    assert len(said) == 1
    assert f"router collapse: {name}: 100.0% of the tokens" in said[0]


def test_modules_of_fixed_steps_and_out_of_reach_are_not_unused() -> None:
    reach = [[0], [1, 2], [1, 2]]  # module 0 runs at step 0 always; SKIP is 2
    config = MomConfig(**SHAPE, mha_homes=[0, 1, 1], mha_reach=reach)
    logs = {"mha/1": [0, 6, 6], "mha/2": [0, 6, 6]}
    assert watched(config, [logs] * 10) == []


@pytest.fixture
def data() -> TokenData:
    tokens = np.random.default_rng(0).integers(0, 61, 16 * 60).astype(np.uint16)
    return TokenData(tokens[: 16 * 50], tokens[16 * 50 :], 16, "0" * 32)


def train(
    folder: Path, data: TokenData, model: PreTrainedModel, teacher: PreTrainedModel | None, **changes: object
) -> list[str]:
    """Train for a while; what was said beside how far it is."""
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    values = {"steps": 30, "batch_size": 4, "learning_rate": 1e-4, "precision": "fp32", "log_every": 5, **changes}
    set_seed(0)
    fit(model, teacher, data, TrainBlock(**values), Place(folder, "t", Console(quiet=True), say=said.append))
    assert [line for line in said if line.startswith("step ")]
    return [line for line in said if not line.startswith("step ")]


def test_real_collapse_is_seen_while_training(
    tmp_path: Path, data: TokenData, make_gpt2: Callable[..., GPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router whose bias sends every token to module 0 at every step."""
    monkeypatch.setattr(watch.RouterWatch.__init__, "__defaults__", (20,))
    said = {}
    for name, bias in (("healthy", 0.0), ("collapsed", 50.0)):
        set_seed(3)
        model = MomForCausalLM(MomConfig(**SHAPE))
        with torch.no_grad():
            for part, parameter in model.named_parameters():
                if part.endswith("mha_router.bias"):
                    parameter[:, 0] += bias
        said[name] = train(tmp_path / name, data, model, make_gpt2())
    assert said["healthy"] == []
    assert any("mha module 0: 100.0%" in line for line in said["collapsed"])
    assert any("mha module 1: no token has chosen it for 20 steps" in line for line in said["collapsed"])
    assert not any("ffn" in line for line in said["collapsed"])


def test_overfitting_is_told_once_and_its_best_checkpoint_stays(
    tmp_path: Path, data: TokenData, make_gpt2: Callable[..., GPT2LMHeadModel]
) -> None:
    """Random tokens can only be learned by heart: the held-out loss must rise."""
    changes = {"steps": 120, "learning_rate": 3e-3, "save_every": 10, "keep": 2}
    said = train(tmp_path / "run", data, make_gpt2(), None, **changes)
    assert len(said) == 1
    assert said[0].startswith("warning: overfitting: the held-out loss has risen 3 times in a row to ")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert best < 100
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert kept == sorted(f"checkpoint-{step}" for step in (best, 110, 120))


def test_earlier_losses_of_a_resumed_run_count(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {s}, "eval_loss": {s / 10}}}\n' for s in (1, 2, 3)))
    said: list[str] = []
    one = OverfitWatch(metrics, said.append)
    one.on_train_begin(None, None, None)
    one.on_evaluate(None, SimpleNamespace(global_step=4), None, metrics={"eval_loss": 0.4})
    assert len(said) == 1
    assert "it was 0.1000 at step 1" in said[0]


def test_earlier_losses_that_were_no_numbers_are_passed_over(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "eval_loss": "inf"}\n{"step": 2, "eval_loss": 3.0}\n{"step": 3, "loss": 1.0}\n')
    said: list[str] = []
    one = OverfitWatch(metrics, said.append)
    one.on_train_begin(None, None, None)
    for step in (4, 5, 6):
        one.on_evaluate(None, SimpleNamespace(global_step=step), None, metrics={"eval_loss": float(step)})
    assert len(said) == 1
    assert "it was 3.0000 at step 2" in said[0]


def test_tokenizers_that_differ_are_refused() -> None:
    texts = ["the cat sat on the mat " * 20, "a dog ate the bone " * 20]
    one, other = train_tokenizer(texts, 270), train_tokenizer(texts[::-1] + ["zebra zebra zebra"] * 20, 270)
    check_same_tokens(one, train_tokenizer(texts, 270))
    with pytest.raises(MomifyError, match=r"token '.*' has id .* and "):
        check_same_tokens(one, other)
