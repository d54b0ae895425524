"""models.py: the teacher is the dense model with its activation fused."""

from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from momify.convert.source import open_source
from momify.models import load_dense, load_teacher


def saved(model: GPT2LMHeadModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_the_teacher_says_what_the_source_says_in_fewer_operators(make_gpt2, tmp_path):
    folder = saved(make_gpt2(activation_function="gelu_new"), tmp_path)
    dense, teacher = load_dense(open_source(folder)), load_teacher(open_source(folder))
    ids = torch.randint(0, 61, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(teacher(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    assert isinstance(teacher.transformer.h[0].mlp.act, torch.nn.GELU)


def test_another_activation_stays_as_it_is(make_gpt2, tmp_path):
    folder = saved(make_gpt2(activation_function="relu"), tmp_path)
    teacher = load_teacher(open_source(folder))
    assert isinstance(teacher.transformer.h[0].mlp.act, torch.nn.ReLU)
