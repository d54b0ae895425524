"""sweep/findings.py: what follows from losses that are made up, so that the answer is known."""

from dataclasses import replace

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


ONE_SEED = [row(4, 4, 0.0), row(4, 3, 0.2), row(4, 2, 0.6), row(3, 4, 0.1), row(2, 4, 0.3), row(1, 4, 0.9)]
ROWS = [replace(one, seed=seed, loss_after=one.loss_after + noise) for one in ONE_SEED
        for seed, noise in ((0, -0.001), (1, 0.001))]  # fmt: skip


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


def test_seeds_are_averaged_and_two_standard_errors_decide() -> None:
    cells = ((4, 4, 0.0), (3, 4, 0.1), (4, 3, 0.12))
    both = [row(m, f, a, seed, noise) for m, f, a in cells for seed, noise in ((0, -0.1), (1, 0.1))]
    modules = compare(both, LAYERS)[0]
    assert modules.added == pytest.approx({"mha": 0.1, "ffn": 0.12})
    assert modules.standard_error == pytest.approx((2 * 0.02 / 2) ** 0.5)  # a variance of 0.02, two seeds, two kinds
    assert modules.more_redundant is None
    assert sentence(modules).endswith("no difference beyond the spread over seeds (2 standard errors: 0.2828)")
    close = [row(m, f, a, seed, noise) for m, f, a in cells for seed, noise in ((0, -0.005), (1, 0.005))]
    assert compare(close, LAYERS)[0].more_redundant == "mha"  # 0.02 against 0.0141


def test_one_seed_gives_no_verdict() -> None:
    for finding in compare(ONE_SEED, LAYERS):
        assert (finding.standard_error, finding.more_redundant) == (None, None)
        assert sentence(finding).endswith("; one seed, spread unknown")
    agree = [replace(one, seed=seed) for one in ONE_SEED for seed in (0, 1)]
    assert sentence(compare(agree, LAYERS)[0]).endswith("; seeds agree, spread unknown")


def test_a_loss_that_is_not_finite_gives_no_verdict() -> None:
    lost = [replace(one, loss_after=float("inf")) if one.ffn == 2 else one for one in ROWS]
    assert sentence(compare(lost, LAYERS)[0]).endswith("; a loss is not finite")


def test_of_an_unfinished_sweep_the_seeds_that_have_every_pool_count() -> None:
    assert compare(ROWS[:-1], LAYERS) == compare([one for one in ROWS if one.seed == 0], LAYERS)


def test_between_cells_each_seed_has_a_line_of_its_own() -> None:
    """At 300 parameters feed-forward modules lie half-way between 3 and 2 kept: seeds 0 and 1 at 0.4 and 0.4 + 0.03."""
    tilted = [
        replace(one, loss_after=one.loss_after + (0.06 if (one.ffn, one.seed) == (2, 1) else 0.0)) for one in ROWS
    ]
    parameters = compare(tilted, LAYERS)[1]
    assert parameters.added["ffn"] == pytest.approx(0.4 + 0.03 / 2)
    deviations = (0.002 / 2**0.5, 0.032 / 2**0.5)  # of attention's two losses, and of these two
    assert parameters.standard_error == pytest.approx(sum(d**2 / 2 for d in deviations) ** 0.5)


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
    swapped = [row(one.ffn, one.mha, one.loss_after - 2.1, one.seed) for one in ROWS]
    against = "feed-forward modules are more redundant, unlike the paper's finding"
    assert sentence(compare(swapped, LAYERS)[0]).endswith(against)
