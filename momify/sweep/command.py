"""The command `momify sweep`: parse, call, show. Heavy imports stay inside."""

import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from momify.errors import MomifyError
from momify.terminal import AsJson, Overrides, Overwrite, Quiet, Resume, open_screen, say_stopped

if TYPE_CHECKING:
    from momify.recipe import Recipe
    from momify.screen import Screen
    from momify.sweep.cells import Scored, Sweep

WRITTEN = ("sweep.csv", "sweep.svg", "sweep.md")  # beside the cells


def sweep(
    model: Annotated[str, typer.Argument(help="Hub name, folder, builtin:demo, or a recipe file.", show_default=False)],
    overrides: Overrides = None,
    mha: Annotated[str, typer.Option(help="Attention modules to keep, as in 12,8,4.", show_default=False)] = ...,
    ffn: Annotated[str, typer.Option(help="Feed-forward modules to keep, as in 12,9,6.", show_default=False)] = ...,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that each cell trains on.", show_default=False)] = ...,
    grid: Annotated[
        str, typer.Option(help="curves: one kind varies, all of the other stay; full: every pair besides.")
    ] = "curves",
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Text to train on (txt, jsonl, parquet); repeatable.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate; else the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences a step; else the recipe's.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", "--seed", help="Seeds, as in 0,1,2: each cell once for each.")] = "0",
    name: Annotated[str | None, typer.Option(help="Name of the sweep; <model>-sweep if left out.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Which modules are redundant: loss against modules kept, one curve a kind. Writes runs/<name>/sweep.*.

    Each cell is a run of its own, trained on the same number of tokens. --resume goes on with a sweep that was killed.
    """
    from momify.sweep.grid import Grid, read_numbers

    wanted = Grid(read_numbers(mha, "--mha"), read_numbers(ffn, "--ffn"), read_numbers(seeds, "--seeds", least=0), grid)
    settings = {"data.train": data, "train.learning_rate": learning_rate, "train.batch_size": batch_size}
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]
    screen = open_screen(quiet, as_json)
    from momify.sweep.cells import Sweep, checked, source_layers

    base = _base(model, bool(data), [*(overrides or []), *given], screen)
    folder = _folder(name or f"{_plain_name(model)}-sweep", resume, overwrite)
    found = checked(Sweep(base, wanted, folder, source_layers(base, screen)), tokens, screen)
    _make_room(folder, overwrite)
    _sweep(found, model, screen, as_json)


def _base(model: str, has_data: bool, overrides: list[str], screen: "Screen") -> "Recipe":
    """The recipe whose pool the cells replace: a file's, the demo's, or the defaults for any other model."""
    from momify.demo.recipe import demo_recipe
    from momify.models import BUILTIN
    from momify.recipe import dump_recipe, load_recipe, make_recipe, parse_recipe
    from momify.subject import context_length

    pool = {"mha": 1, "ffn": 1}
    if Path(model).suffix in (".yaml", ".yml"):
        found = load_recipe(Path(model), overrides)
        return found if found.mom else make_recipe({**found.model_dump(), "mom": pool}, f"recipe {model}")
    if model == BUILTIN:
        return demo_recipe(overrides)
    if not has_data and not any(override.startswith("data.train=") for override in overrides):
        raise MomifyError(f"there is no text known to train {model} on; name some with --data FILE")
    data = {"train": [BUILTIN], "block_length": context_length(model, None, screen)}
    defaults = make_recipe({"source": {"model": model}, "mom": pool, "data": data}, "command line")
    return parse_recipe(dump_recipe(defaults), "command line", overrides)


def _plain_name(model: str) -> str:
    """What a sweep of a model, or of a recipe, is called where no name is given."""
    from momify.runs import plain_name
    from momify.subject import model_name

    return plain_name(Path(model).stem) if Path(model).suffix in (".yaml", ".yml") else model_name(model)


def _folder(name: str, resume: bool, overwrite: bool) -> Path:
    """The folder of all cells. Raises MomifyError for a name that is none, and for an earlier sweep left as it is."""
    from momify.recipe import make_recipe
    from momify.runs import ONE_OF_TWO, RUNS

    checked = make_recipe({"run": {"name": name}, "source": {"model": "x"}, "mom": {"mha": 1, "ffn": 1},
                           "data": {"train": "x"}}, "command line")  # fmt: skip
    folder = RUNS / checked.run.name
    if (folder / "recipe.yaml").exists():
        raise MomifyError(f"{folder} is a single run; give the sweep another --name")
    if folder.exists() and any(folder.iterdir()) and not (resume or overwrite):
        raise MomifyError(f"{folder} holds an earlier sweep; --resume goes on with it, --overwrite starts anew")
    if resume and overwrite:
        raise MomifyError(ONE_OF_TWO)
    if resume and not folder.exists():
        raise MomifyError(f"{folder} holds no sweep to resume; start it without --resume")
    return folder


def _make_room(folder: Path, overwrite: bool) -> None:
    """Remove the earlier sweep that is to be overwritten, all of it: of two sweeps no cell is the other's."""
    from momify.processes import first_then_others, is_first
    from momify.runs import remove_runs

    with first_then_others():
        if overwrite and is_first():
            remove_runs(folder, WRITTEN)


def _sweep(found: "Sweep", model: str, screen: "Screen", as_json: bool) -> None:
    """Run the cells and show what they say."""
    from momify.sweep.cells import run_cells
    from momify.sweep.write import write_sweep
    from momify.train.fit import Stopped

    title = f"{model}: held-out loss against modules kept"
    screen.say(f"{len(found.cells)} cells of {found.steps:,} steps each; every one is a run under {found.folder}")
    try:
        rows = run_cells(found, screen, lambda rows: write_sweep(found.folder, title, rows, found.layers))
    except BaseException:
        with suppress(OSError):  # nothing is left of a sweep that could not begin
            found.folder.rmdir()
            found.folder.parent.rmdir()
        raise
    if isinstance(rows, Stopped):
        again = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        say_stopped(rows, f"momify {shlex.join([*again, '--resume'])}")
    if rows:
        _show(found, title, rows, screen, as_json)


def _show(found: "Sweep", title: str, rows: list["Scored"], screen: "Screen", as_json: bool) -> None:
    from momify.sweep.write import HEAD, conclusions, table

    if as_json:
        typer.echo(json.dumps(_as_dict(found, rows), indent=2))
        return
    screen.table(title, HEAD, table(rows, found.layers))
    screen.say(f"wrote {found.folder / 'sweep.csv'}, sweep.svg and sweep.md")
    for line in conclusions(rows, found.layers):
        typer.echo(line)


def _as_dict(found: "Sweep", rows: list["Scored"]) -> dict[str, Any]:
    from dataclasses import asdict

    from momify.sweep.findings import compare

    findings = [{**asdict(one), "more_redundant": one.more_redundant} for one in compare(rows, found.layers)]
    return {"folder": str(found.folder), "cells": [asdict(row) for row in rows], "findings": findings}
