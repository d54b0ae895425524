"""What commands share: options that mean the same everywhere, the screen, and words on wrong usage and stopped runs."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from momify.screen import Screen

INTERRUPTED = 130  # the exit code of Ctrl-C
UsageError = typer.BadParameter.__base__
"""What typer raises for wrong usage: click's class, which newer versions of typer carry inside."""
Overrides = Annotated[
    list[str] | None, typer.Argument(help="block.key=value, as in train.steps=100.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped or killed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew where an earlier run lies.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show the result only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")]


def open_screen(quiet: bool = False, as_json: bool = False) -> "Screen":
    """The screen of a command; with --json only the numbers go to standard output."""
    from rich.console import Console

    from momify.pipeline import quiet_libraries
    from momify.processes import is_first
    from momify.screen import Screen

    quiet_libraries()
    return Screen(Console(stderr=as_json, quiet=not is_first()), quiet)


def listed(text: str | None) -> list[str] | None:
    """The parts of a comma-separated option, without white space; None for one that was not given."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def say_stopped(stopped: Any, command: str) -> None:
    """Say how a run that a signal ended goes on; exit code 1, as it did not finish."""
    from momify.processes import is_first

    line = f"momify: stopped by {stopped.signal} at step {stopped.step}, saved; go on with: {command}"
    if is_first():
        typer.echo(line, err=True)
    raise typer.Exit(1)


def end(code: int | None) -> None:
    """Leave with the code of a command; typer turns Ctrl-C into a code, and says nothing."""
    if code == INTERRUPTED:
        typer.echo("momify: interrupted", err=True)
    sys.exit(code)


def say_usage(error: Exception) -> None:
    """Say in one line what is wrong with the options, with the remedy; `momify` alone has shown its help already."""
    words = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # the help, empty where rich has printed it
        typer.echo(words, err=True, nl=bool(words))
        return
    words = " ".join(words.split()).rstrip(".")
    typer.echo(f"momify: {words[:1].lower()}{words[1:]}{_given(error)}; see {_command(error)} --help", err=True)


def _given(error: Exception) -> str:
    """The value that was refused, where typer leaves it to pydantic, which does not name it."""
    from pydantic import ValidationError

    from momify.mistakes import short

    cause = error.__cause__
    return f" (got {short(cause.errors()[0]['input'])})" if isinstance(cause, ValidationError) else ""


def _command(error: Exception) -> str:
    """The command whose help tells more. An option without its value is found before typer knows whose it is."""
    if error.ctx:
        return error.ctx.command_path
    return " ".join(["momify", *(word for word in sys.argv[1:2] if not word.startswith("-"))])
