"""Tab-separated files as GLUE writes them: no quoting, one row a line, named columns."""

from collections.abc import Iterator
from pathlib import Path

from momify.errors import MomifyError

_LONGEST_SHOWN = 40


def read_bytes(path: Path) -> bytes:
    """All bytes of a user's file. Raises MomifyError naming it and the reason."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise MomifyError(f"{path} cannot be read: {error.strerror or error}; give a readable file") from None


def decode(data: bytes, path: Path) -> str:
    """UTF-8 text, without a byte-order mark. Raises MomifyError naming file and line."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MomifyError(f"{path} line {line} is not UTF-8 (byte {error.start}); convert the file to UTF-8") from None


def read_rows(
    path: Path, text: str, columns: tuple[str, ...], header: tuple[str, ...] | None, skip_short: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """(line number, the named columns) of each row; `header` names the columns of a file without a header line.

    Rows end at line feeds alone: other separators of Unicode are part of a sentence. Raises MomifyError, naming file
    and line, for a missing column and a row of another width (a narrower one is passed over with `skip_short`).
    """
    lines = text.split("\n")
    while lines and not lines[-1].strip("\r"):
        lines.pop()
    first = 1
    if header is None:
        header, first = tuple(lines[0].rstrip("\r").split("\t")) if lines else (), 2
    places = [_place(path, header, column) for column in columns]
    for number, line in enumerate(lines[first - 1 :], first):
        cells = line.removesuffix("\r").split("\t")
        if len(cells) < len(header) and skip_short:
            continue
        if len(cells) != len(header):
            raise MomifyError(
                f"{path} line {number} has {len(cells)} columns instead of {len(header)}; mend the row, "
                "or take the file as GLUE publishes it (tabs between columns, no quoting)"
            )
        yield number, [cells[place] for place in places]


def _place(path: Path, header: tuple[str, ...], column: str) -> int:
    if column not in header:
        known = ", ".join(shown(name) for name in header[:20]) or "none"
        raise MomifyError(f"{path} has no column {column!r} in its first line; it has: {known}")
    return header.index(column)


def shown(text: str) -> str:
    """A foreign text as it may stand in an error: printable, short."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
