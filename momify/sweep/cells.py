"""A sweep, cell by cell: each a run of its own, converted, trained and scored by the pipeline's own functions."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from momify.conversion import tokens_of
from momify.convert.source import read_config
from momify.convert.stored_mom import read_mom_config
from momify.data.tokenizer import load_tokenizer
from momify.errors import MomifyError
from momify.evaluate.results import Results, read_results
from momify.measure.cost import kv_bytes_per_token, mom_macs, parameters, planned_usage
from momify.models import locate, read_provenance
from momify.pipeline import EvalOptions, check, evaluate_ppl, kept_start, train
from momify.processes import is_first
from momify.recipe import Recipe
from momify.runs import Run, opened_run
from momify.screen import Screen
from momify.subject import Subject
from momify.sweep.grid import Cell, Grid, cell_recipe, cells_of
from momify.train.fit import Stopped
from momify.train.tokens import fewest_steps

RESULTS = Path("eval") / "ppl.json"


@dataclass(frozen=True)
class Sweep:
    """What is swept: the recipe that the cells share, the grid, and where it all goes."""

    base: Recipe
    grid: Grid
    folder: Path
    layers: int
    """Modules of each kind that the source has."""

    @property
    def steps(self) -> int:
        """Optimizer steps a cell."""
        return self.base.train.steps

    @property
    def cells(self) -> list[Cell]:
        """All cells, the whole pool first."""
        return cells_of(self.grid, self.layers)

    def recipe(self, cell: Cell) -> Recipe:
        """What a cell's run is started with."""
        return cell_recipe(self.base, cell, self.folder, self.steps)


@dataclass(frozen=True)
class Scored:
    """A finished cell. Losses in nats per held-out token; MACs of one sequence of a block, each token at its home."""

    mha: int
    ffn: int
    seed: int
    parameters: int
    macs: int
    kv_bytes_per_token: int  # 16 bit
    tokens: int  # trained on
    source_loss: float
    loss_before: float  # as converted
    loss_after: float  # as trained
    protocol: str
    run: str

    def kept(self, kind: str) -> int:
        """Modules kept of that kind."""
        return self.mha if kind == "mha" else self.ffn


def source_layers(base: Recipe, screen: Screen) -> int:
    """Layers of the source that a sweep prunes. Raises MomifyError where it has yet to be trained."""
    if base.source.scratch:
        raise MomifyError(
            "a sweep needs a source that exists; train this one first with momify train, then sweep runs/<name>/source"
        )
    return read_config(locate(base.source.model, base.source.revision, screen.say)).n_layer


def checked(sweep: Sweep, tokens: int, screen: Screen) -> Sweep:
    """The sweep with the fewest steps a cell that see `tokens`.

    Raises MomifyError for text that cannot be read and for a cell that the source cannot give, before the first.
    """
    for cell in sweep.cells:
        if cell.seed == sweep.cells[0].seed:
            check(sweep.recipe(cell), screen)
    base, source = sweep.base, sweep.base.source
    data = tokens_of(base.data, load_tokenizer(locate(source.model, source.revision, screen.say)), screen)
    train = base.train.model_copy(update={"steps": fewest_steps(tokens, data, base.train)})
    return replace(sweep, base=base.model_copy(update={"train": train}))


def run_cells(sweep: Sweep, screen: Screen, done: Callable[[list[Scored]], None]) -> list[Scored] | Stopped:
    """Train and score every cell that is not finished; `done` is told all rows after each.

    A cell that was killed goes on from its last checkpoint. Where a signal stops a cell, the sweep stops with it.
    """
    rows: list[Scored] = []
    started, cells = time.monotonic(), sweep.cells
    for index, cell in enumerate(cells):
        left = _left(time.monotonic() - started, index, len(cells))
        screen.say(f"cell {index + 1} of {len(cells)}: {cell.mha} attention and {cell.ffn} feed-forward modules, "
                   f"seed {cell.seed}{left}")  # fmt: skip
        outcome = _run_cell(sweep.recipe(cell), cell, screen, rows)
        if isinstance(outcome, Stopped):
            return outcome
        if outcome:
            rows = [*rows, outcome]
            screen.say(f"  held-out loss {outcome.source_loss:.4f} (source), {outcome.loss_before:.4f} as converted, "
                       f"{outcome.loss_after:.4f} as trained")  # fmt: skip
            done(rows)
    return rows


def _left(seconds: float, done: int, of: int) -> str:
    """Time left at the pace so far; nothing before the first cell is done."""
    if not done:
        return ""
    minutes = seconds / done * (of - done) / 60
    return f"; about {minutes:.0f} min left" if minutes >= 1 else "; less than a minute left"


class BarsAlone(Screen):
    """Shows the bars of a screen; lines go to the log."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(screen.console, screen.quiet)
        self._lines = Screen(screen.console, quiet=True)

    def to_log(self, path: Path) -> None:
        """Keep every further line in `path`."""
        self._lines.to_log(path)

    def say(self, line: str, style: str = "") -> None:
        """One line for the log."""
        self._lines.say(line, style)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Nothing."""


def _run_cell(recipe: Recipe, cell: Cell, screen: Screen, before: list[Scored]) -> Scored | Stopped | None:
    """One cell; None in every process but the first."""
    resume = (recipe.folder / "recipe.yaml").is_file()
    with opened_run(recipe, resume) as run:
        shown = BarsAlone(screen)
        shown.to_log(run.log)
        if before and is_first():
            _carry_source_score(Path(before[0].run), run)
        if stopped := train(recipe, run, shown, resume):
            return stopped
        return _score(recipe, cell, run, shown) if is_first() else None


def _carry_source_score(finished: Path, run: Run) -> None:
    """The source scores the same in every cell; the number is used only if weights, text and protocol agree."""
    kept, target = read_results(finished / RESULTS), Results(run.folder / RESULTS, "ppl")
    for entry in [entry for entry in kept if entry.role == "source"][-1:] if not target.entries else []:
        target.add(entry)


def _score(recipe: Recipe, cell: Cell, run: Run, screen: Screen) -> Scored:
    """Held-out losses and costs of a trained cell. Raises MomifyError where its start was measured on other text."""
    subject, options = Subject(run.folder.name, run.model, "mom", run, recipe), EvalOptions(limit=recipe.eval.limit)
    found = evaluate_ppl(subject, options, screen)
    start = kept_start(subject, options, found["mom"].protocol).get("start")
    if start is None:
        raise MomifyError(f"{run.folder} was converted on other text than there is now; start anew with --overwrite")
    config, length = read_mom_config(run.model), recipe.data.block_length
    return Scored(
        mha=cell.mha,
        ffn=cell.ffn,
        seed=cell.seed,
        parameters=parameters(config).total,
        macs=int(mom_macs(config, 1, length, planned_usage(config, 1, length)).total),
        kv_bytes_per_token=kv_bytes_per_token(config),
        tokens=read_provenance(run.model)["trained"]["tokens"],
        source_loss=found["source"].loss,
        loss_before=start.loss,
        loss_after=found["mom"].loss,
        protocol=found["mom"].protocol,
        run=str(run.folder),
    )
