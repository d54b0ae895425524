"""The command line: parse, call one function, show. Heavy imports stay inside the commands, so --help is instant."""

from pathlib import Path
from typing import Annotated

import typer

from momify.errors import MomifyError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument()],
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train a recipe."""
    from rich.console import Console

    from momify.pipeline import pretrain, quiet_libraries
    from momify.recipe import load_recipe
    from momify.runs import open_run
    from momify.screen import Screen

    quiet_libraries()
    loaded = load_recipe(recipe, overrides)
    run = open_run(loaded, resume, overwrite)
    screen = Screen(Console())
    screen.to_log(run.log)
    pretrain(loaded, run, screen, resume)


@app.callback()
def _root() -> None:
    """momify."""


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    try:
        app()
    except MomifyError as error:
        typer.echo(f"momify: {error}", err=True)
        raise SystemExit(2) from None
