"""What a command shows while it works: lines, tables and progress bars, on the terminal and in the run's log."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from momify.files import disk_errors
from momify.processes import is_first

_FILE_WIDTH = 200  # columns of a table that goes to a file or a pipe

Progress = Callable[..., None]  # done, total, and what is being done where that changes


class Screen:
    """The one place that prints. With `quiet` only what a command was asked for appears; `log` keeps every line."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet, self.log = console, quiet, None
        if not console.is_terminal and "COLUMNS" not in os.environ:  # rich would take 80 and cut the words of tables
            console.width = _FILE_WIDTH

    def to_log(self, path: Path) -> None:
        """Keep every further line in `path` too; of several processes the first does."""
        if not is_first():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.log: Path | None = path

    def say(self, line: str, style: str = "") -> None:
        """One line of progress; texts of users and models are shown as they are, never read as markup."""
        if self.log:
            with disk_errors(self.log), open(self.log, "a", encoding="utf-8") as stream:
                stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        if not self.quiet:
            self.console.print(Text(line, style=style), soft_wrap=True)

    def result(self, path: Path) -> None:
        """Where what was asked for lies, alone on a line, where all else is quiet: for scripts."""
        if self.quiet:
            self.console.print(Text(str(path)), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others are set flush right."""
        if self.quiet:
            return
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """A bar fed with (done, total), or (done, total, title); nothing where the console is no terminal."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = self.console.is_terminal and not self.quiet
        with Bars(*columns, console=self.console, disable=not shown, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total, now=title: bar.update(task, completed=done, total=total, description=now)
