"""Training memory against what was alive in a real training step, and times by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config

from momify.convert.homes import Request
from momify.measure.cost import shape_of
from momify.measure.live_bytes import LiveBytes
from momify.model import MomConfig, MomForCausalLM
from momify.plan import training as plan_training
from momify.plan.make import Speed, make_plan, premises
from momify.plan.reading import read_shape
from momify.plan.training import DEVICES, micro_batch_that_fits, training_activations, training_cost
from momify.recipe_blocks import HIDDEN, TrainBlock
from momify.train import head_loss
from momify.train.head_loss import HeadLoss, Teacher
from momify.train.hidden import HiddenGap, HiddenGoal, matching_depths

FIXED = {f"{kind}_{what}": [[s % 3] for s in range(6)] for kind in ("mha", "ffn") for what in ("reach",)}
PARTS = {**FIXED, "mha_reach": [[3], [1], [3], [0], [3], [2]], "mha_homes": [3, 1, 3, 0, 3, 2],
         "patch_rank": 16, "step_rank": 16}  # fmt: skip


def alive(model: MomForCausalLM, ids: torch.Tensor, bf16: bool) -> int:
    """The most bytes alive in a forward and backward pass as the Trainer does them, beside weights and gradients."""
    width = model.config.hidden_size
    teacher = Teacher(torch.randn(*ids.shape, width), torch.randn(model.config.vocab_size, width))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    with LiveBytes([*known, ids, teacher.hidden, teacher.weight]) as meter:
        start = meter.now
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = HeadLoss(ids, 0.0, 1.0, teacher, chunk=plan_training.CHUNK)
            out = model(input_ids=ids, use_cache=False, output_router_logits=True, head_loss=loss)
        out.loss.backward()
    return meter.peak - start


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, FIXED, PARTS, {"patch_rank": 16}], ids=["routed", "fixed", "parts", "patches"])
@pytest.mark.parametrize(("vocab", "chunk"), [(50, head_loss.CHUNK), (2000, head_loss.CHUNK), (20_000, 200_000)])
def test_activations(changes: dict, vocab: int, chunk: int, precision: str, monkeypatch) -> None:
    monkeypatch.setattr(plan_training, "CHUNK", chunk)
    config = MomConfig(
        vocab_size=vocab, n_positions=64, hidden_size=64, num_attention_heads=2, intermediate_size=256,
        num_mha_modules=3, num_ffn_modules=3, num_steps=6, bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    model = MomForCausalLM(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_(std=0.5)
    ids = torch.randint(0, vocab, (8, 64))
    planned = training_activations(shape_of(config), 8 * 64, TrainBlock(precision=precision))
    assert planned == pytest.approx(alive(model, ids, precision == "bf16"), rel=0.15)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_hidden_states_keep(checkpointed: bool) -> None:
    config = MomConfig(
        vocab_size=50, n_positions=64, hidden_size=64, num_attention_heads=2, intermediate_size=256,
        num_mha_modules=3, num_ffn_modules=3, num_steps=6, bos_token_id=0, eos_token_id=0, **FIXED,
    )  # fmt: skip
    model, ids = MomForCausalLM(config).train(), torch.randint(0, 50, (8, 64))
    if checkpointed:
        model.gradient_checkpointing_enable()
    depths = matching_depths(config, list(range(6)), 6)
    goal, peaks = HiddenGoal(depths, dict.fromkeys(depths.values(), 1.0)), []
    for hidden in (0.0, 1.0):
        with LiveBytes([*model.parameters(), *model.buffers(), ids]) as meter:
            start = meter.now
            gap = HiddenGap(goal, {depth: torch.randn(8, 64, 64) for depth in depths.values()}) if hidden else None
            out = model(input_ids=ids, use_cache=False, labels=ids, observe=gap)
            loss = out.loss + (gap.loss() if hidden else 0)
            loss.backward()
        peaks.append(meter.peak - start)
        model.zero_grad()
    settings = [TrainBlock(hidden=hidden, gradient_checkpointing=checkpointed) for hidden in (0.0, 1.0)]
    planned = [training_activations(shape_of(config), 8 * 64, one) for one in settings]
    assert planned[1] - planned[0] == pytest.approx(peaks[1] - peaks[0], rel=0.15)


def test_by_hand() -> None:
    dense = shape_of(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=10, n_positions=16))
    settings = TrainBlock(steps=3, batch_size=4, micro_batch=2, optimizer="adamw")
    found = training_cost(dense, dense, settings, 16, flops_per_second=1e6)
    parameters = 26 * 8 + 2 * (12 * 64 + 13 * 8) + 16
    assert (found.weights, found.gradients, found.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert found.teacher == 4 * parameters
    forward = 16 * (2 * (12 * 64 + 2 * 16 * 8) + 8 * 10)
    assert found.flops == 2 * 4 * forward * 3 * 4  # three passes of the student, one of the teacher
    assert found.seconds == found.flops / 1e6
    rows = 2 * 16
    assert found.activations == 4 * (
        rows * (2 * (7 * 8 + 32) + 5 * 10) + 2 * 10 * 8
    )  # the head's gradient; both heads in bf16
    lean, *same = (
        training_cost(dense, dense, settings.model_copy(update={"optimizer": optimizer}), 16, 1e6)
        for optimizer in ("muon", "normuon", None)
    )
    assert same == [lean, lean]
    modules = 2 * (12 * 64 + 9 * 8)  # without the LayerNorms, which are no modules
    assert found.optimizer - lean.optimizer == 4 * modules
    still = training_cost(dense, dense, settings.model_copy(update={"freeze_embeddings": True}), 16, 1e6)
    assert (found.gradients - still.gradients, found.optimizer - still.optimizer) == (4 * 26 * 8, 8 * 26 * 8)
    assert found.flops - still.flops == 2 * (16 * 8 * 10) * 3 * 4  # the head's weight gradient


def test_no_teacher_without_distillation() -> None:
    dense = read_shape("gpt2")
    plain = training_cost(dense, dense, TrainBlock(distill=0, cross_entropy=1), 64, 1e12)
    assert plain.teacher == 0
    assert plain.flops == 0.75 * training_cost(dense, dense, TrainBlock(), 64, 1e12).flops
    asked = training_cost(dense, dense, TrainBlock(distill=0, cross_entropy=1, hidden=1), 64, 1e12)
    assert (asked.teacher, asked.flops) == (asked.weights, plain.flops / 0.75)


@pytest.mark.parametrize(("init", "hidden"), [("home", HIDDEN), ("random", 0.0)])
def test_a_plan_counts_hidden_states_where_they_are_followed_by_default(init: str, hidden: float) -> None:
    given, request = premises("gpt2"), Request(mha=6, ffn=9, init=init)
    speed = Speed("a100", 1e14, "guessed")
    default, told = (
        make_plan(replace(given, train=train), request, speed) for train in (TrainBlock(), TrainBlock(hidden=hidden))
    )
    assert default.training == told.training


def test_checkpointing_saves_activations() -> None:
    dense, settings = read_shape("gpt2"), TrainBlock()
    lean = settings.model_copy(update={"gradient_checkpointing": True})
    assert training_activations(dense, 1024, lean) < training_activations(dense, 1024, settings)


def test_the_micro_batch_that_fits() -> None:
    dense, settings = read_shape("gpt2-large"), TrainBlock(batch_size=48)
    fits = micro_batch_that_fits(dense, dense, settings, 1024, DEVICES["a100"])
    assert 48 % fits == 0
    sizes = [
        training_cost(dense, dense, settings.model_copy(update={"micro_batch": batch}), 1024, 1e12).bytes
        for batch in (fits, next(batch for batch in range(fits + 1, 49) if 48 % batch == 0))
    ]
    assert sizes[0] <= 0.9 * 80e9 < sizes[1]
    assert micro_batch_that_fits(read_shape("gpt2-xl"), read_shape("gpt2-xl"), settings, 1024, DEVICES["l4"]) is None


def test_the_plan_knows_how_many_logits_the_losses_hold() -> None:
    assert plan_training.CHUNK == head_loss.CHUNK
