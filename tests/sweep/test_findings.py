"""sweep/findings.py: what follows from losses that are made up, so that the answer is known."""

import pytest

from momify.sweep.cells import Scored
from momify.sweep.findings import compare, curve, sentence

LAYERS = 4


def row(mha: int, ffn: int, added: float, seed: int = 0, noise: float = 0.0) -> Scored:
    """A cell of a model whose attention module has 100 parameters and 3 MACs, a feed-forward one 200 and 1."""
    return Scored(
        mha=mha, ffn=ffn, seed=seed, parameters=1000 + 100 * mha + 200 * ffn, macs=50 + 3 * mha + ffn,
        kv_bytes_per_token=mha, tokens=64, source_loss=2.0, loss_before=3.0 + added, loss_after=2.1 + added + noise,
        protocol="block 8", run=f"runs/{mha}x{ffn}",
    )  # fmt: skip


ROWS = [row(4, 4, 0.0), row(4, 3, 0.2), row(4, 2, 0.6), row(3, 4, 0.1), row(2, 4, 0.3), row(1, 4, 0.9)]


def test_same_amount_is_asked_in_modules_parameters_and_macs() -> None:
    modules, parameters, macs = compare(ROWS, LAYERS)
    assert (modules.measure, modules.amount) == ("modules", 2)  # attention lost 3 at most, feed-forward 2
    assert modules.added == pytest.approx({"mha": 0.3, "ffn": 0.6})
    assert modules.more_redundant == "mha"
    assert parameters.amount == 300  # 3 attention modules, 1.5 feed-forward ones: half-way between 0.2 and 0.6
    assert parameters.added == pytest.approx({"mha": 0.9, "ffn": 0.4})
    assert parameters.more_redundant == "ffn"
    assert macs.amount == 2  # 2 feed-forward modules, two thirds of an attention module
    assert macs.added == pytest.approx({"mha": 0.2 / 3, "ffn": 0.6})


def test_added_loss_is_over_the_whole_pool_trained_on_as_much() -> None:
    points = curve(ROWS, "mha", LAYERS)
    assert [point.kept for point in points] == [1, 2, 3, 4]
    assert [point.added for point in points] == pytest.approx([0.9, 0.3, 0.1, 0.0])


def test_seeds_are_averaged_and_a_difference_within_their_spread_is_none() -> None:
    both = [row(m, f, a, seed, noise) for m, f, a in ((4, 4, 0.0), (3, 4, 0.1), (4, 3, 0.12))
            for seed, noise in ((0, -0.1), (1, 0.1))]  # fmt: skip
    modules = compare(both, LAYERS)[0]
    assert modules.added == pytest.approx({"mha": 0.1, "ffn": 0.12})
    assert modules.spread == pytest.approx(0.02**0.5)
    assert modules.more_redundant is None
    assert "no difference beyond the spread over seeds" in sentence(modules)
    assert compare([one for one in both if one.seed == 0], LAYERS)[0].more_redundant == "mha"


def test_cells_with_both_kinds_pruned_are_no_part_of_the_two_curves() -> None:
    assert compare([*ROWS, row(2, 2, 5.0)], LAYERS) == compare(ROWS, LAYERS)
    assert [point.kept for point in curve([*ROWS, row(2, 2, 5.0)], "mha", LAYERS, others=2)] == [2, 4]


def test_one_kind_alone_gives_no_finding() -> None:
    assert compare([one for one in ROWS if one.ffn == 4], LAYERS) == []


def test_sentences_name_the_amount_both_losses_and_the_paper() -> None:
    words = [sentence(finding) for finding in compare(ROWS, LAYERS)]
    assert words[0] == (
        "2 modules removed: attention adds +0.3000 nats (+0.1500 a module), feed-forward adds +0.6000 nats "
        "(+0.3000 a module); attention modules are more redundant, as the paper finds"
    )
    assert words[1].endswith("feed-forward is the cheaper to remove")
    swapped = [row(one.ffn, one.mha, one.loss_after - 2.1) for one in ROWS]
    against = "feed-forward modules are more redundant, unlike the paper's finding"
    assert sentence(compare(swapped, LAYERS)[0]).endswith(against)
