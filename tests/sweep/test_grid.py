"""sweep/grid.py: which cells there are, and what each is trained with."""

from pathlib import Path

import pytest

from momify.errors import MomifyError
from momify.recipe import parse_recipe
from momify.sweep.grid import Grid, cell_recipe, cells_of, read_numbers

BASE = """
source: {model: src}
mom: {mha: 8, ffn: 12, mha_steps: 16, depth: 20, refit_tokens: 0}
data: {train: a.txt, block_length: 32}
train: {steps: 5000, batch_size: 4, learning_rate: 3.0e-3}
"""


def test_curves_vary_one_kind_beside_the_whole_pool_of_the_other() -> None:
    cells = cells_of(Grid((6, 2), (12, 9)), 12)
    assert [(cell.mha, cell.ffn) for cell in cells] == [(12, 12), (12, 9), (6, 12), (2, 12)]


def test_full_grid_has_every_pair_besides() -> None:
    cells = cells_of(Grid((6, 2), (9,), seeds=(1, 0), kind="full"), 12)
    pools = [(12, 12), (12, 9), (6, 12), (6, 9), (2, 12), (2, 9)]
    assert [(cell.mha, cell.ffn, cell.seed) for cell in cells] == [(*pool, seed) for pool in pools for seed in (0, 1)]
    assert len({cell.name for cell in cells}) == 12


def test_numbers_are_each_once_and_the_largest_first() -> None:
    assert read_numbers("4,12, 8,4", "--mha") == (12, 8, 4)
    for text in ("", "4;3", "4,x", "0", "-1,4"):
        with pytest.raises(MomifyError, match="--mha is"):
            read_numbers(text, "--mha")
    with pytest.raises(MomifyError, match="--grid is 'square'; use one of curves, full"):
        cells_of(Grid((2,), (2,), kind="square"), 4)


def test_recipe_of_a_cell_changes_pool_seed_folder_and_steps_alone() -> None:
    base = parse_recipe(BASE, "x")
    recipe = cell_recipe(base, cells_of(Grid((6,), (12,), seeds=(7,)), 12)[1], Path("runs/s"), 40)
    assert recipe.folder == Path("runs/s/6x12-seed7")
    assert (recipe.mom.mha, recipe.mom.ffn, recipe.run.seed, recipe.train.steps) == (6, 12, 7, 40)
    assert (recipe.mom.depth, recipe.mom.mha_steps, recipe.mom.ffn_steps) == (None, None, None)
    assert recipe.mom.importance == "cosine", "the same measure in all cells"
    named = parse_recipe(BASE.replace("mha: 8", "importance: greedy, mha: 8"), "x")
    assert cell_recipe(named, cells_of(Grid((6,), (12,)), 12)[1], Path("runs/s"), 40).mom.importance == "greedy"
    same = {"mom": {"mha", "ffn", "depth", "mha_steps", "ffn_steps", "importance"}, "train": {"steps"}, "run": True}
    assert recipe.model_dump(exclude=same) == base.model_dump(exclude=same)
