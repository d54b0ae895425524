"""The three counts on the model that ships and on MoMs made from it, on real text, whatever their routers choose."""

from pathlib import Path

import pytest
import torch

import momify
from momify.convert.assemble import assemble, network_of
from momify.convert.homes import Request, choose_homes
from momify.convert.importance import Importance
from momify.convert.source import open_source
from momify.data.tokenizer import load_tokenizer
from momify.demo.corpus import documents
from momify.measure.macs import count_macs

CHECKPOINT = Path(momify.__file__).parent / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    """Three blocks of 128 tokens from different documents."""
    tokenizer = load_tokenizer(CHECKPOINT)
    found = [tokenizer(document.text[:4000])["input_ids"] for document in documents()[:40]]
    return [torch.tensor([ids[:128]]) for ids in found if len(ids) >= 128][:3]


@pytest.mark.parametrize("picks", [1, 2])
def test_counts_agree_on_real_text(texts: list[torch.Tensor], picks: int) -> None:
    source = open_source(CHECKPOINT)
    importance = Importance("leave_one_out", 12, 1, 0.0, tuple(range(12)), tuple(range(12)))
    homes = choose_homes(importance, Request(6, 9, modules_per_token=picks, reach="all"))
    model = assemble(source, network_of(source), homes)
    with torch.no_grad():
        for router in (model.model.mha_router, model.model.ffn_router):
            router.weight.normal_(std=0.3)
    counts = count_macs(model, texts)
    assert counts.agree
    assert counts.largest_difference == 0
    totals = {macs.total for macs in counts.closed}
    assert len(totals) > 1  # the routers really chose, not the same for every text


def test_the_source(texts: list[torch.Tensor]) -> None:
    from momify.models import load_dense

    counts = count_macs(load_dense(open_source(CHECKPOINT)), texts[:1])
    assert counts.agree
    assert counts.largest_difference == 0
