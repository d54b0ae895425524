"""Which cells a sweep consists of, and the recipe of each: the same training, another pool."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from momify.errors import MomifyError
from momify.recipe import Recipe, make_recipe

GRIDS = ("curves", "full")


@dataclass(frozen=True)
class Cell:
    """One training: so many modules kept of each kind, and its seed."""

    mha: int
    ffn: int
    seed: int

    @property
    def name(self) -> str:
        """Its run folder within the sweep's."""
        return f"{self.mha}x{self.ffn}-seed{self.seed}"

    def kept(self, kind: str) -> int:
        """Modules kept of that kind."""
        return self.mha if kind == "mha" else self.ffn


@dataclass(frozen=True)
class Grid:
    """What is swept over: modules kept of each kind, from the whole pool down, and seeds."""

    mha: tuple[int, ...]
    ffn: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    kind: str = "curves"
    """curves: one kind varies while all modules of the other stay; full: besides, every pair."""


def read_numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """`12,8,4` -> (12, 8, 4), each once, the largest first. Raises MomifyError naming the option."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise MomifyError(f"{option} is {text!r:.60}; give whole numbers with commas between, as in 12,8,4") from None
    if any(number < least for number in numbers):
        raise MomifyError(f"{option} is {text!r:.60}; give numbers of {least} and more")
    return tuple(sorted(set(numbers), reverse=True))


def cells_of(grid: Grid, layers: int) -> list[Cell]:
    """All cells, the whole pool of `layers` modules a kind first: what every other is set against.

    Raises MomifyError for an unknown kind of grid.
    """
    if grid.kind not in GRIDS:
        raise MomifyError(f"--grid is {grid.kind!r:.60}; use one of {', '.join(GRIDS)}")
    pools = {(layers, layers), *((mha, layers) for mha in grid.mha), *((layers, ffn) for ffn in grid.ffn)}
    if grid.kind == "full":
        pools |= set(product(grid.mha, grid.ffn))
    return [Cell(mha, ffn, seed) for mha, ffn in sorted(pools, reverse=True) for seed in sorted(grid.seeds)]


def cell_recipe(base: Recipe, cell: Cell, folder: Path, steps: int) -> Recipe:
    """`base` with the cell's pool and seed, in a run folder of its own; each kept module has one step.

    What goes is chosen by the same measure in all cells, block influence unless `base` names one.
    """
    values = base.model_dump()
    values["run"] = {"name": cell.name, "seed": cell.seed, "dir": str(folder / cell.name)}
    values["mom"] |= {"mha": cell.mha, "ffn": cell.ffn, "depth": None, "mha_steps": None, "ffn_steps": None,
                      "importance": base.mom.importance or "cosine"}  # fmt: skip
    values["train"]["steps"] = steps
    return make_recipe(values, f"cell {cell.name}")
