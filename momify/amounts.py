"""Numbers with their units, as reports, plans and tables show them."""

_LARGE = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def amount(value: float) -> str:
    """A count with its SI letter, three figures: 774 M, 1.77 T, 512."""
    for letter, unit in _LARGE:
        if abs(value) >= unit * 0.9995:  # 999,600 reads 1.00 M, not 1000 k
            return f"{three_figures(value / unit)} {letter}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes with their unit, three figures: 180 KiB."""
    for letters, unit in _BYTES:
        if abs(value) >= unit * 1023.5 / 1024:  # as in `amount`: never 1024 KiB
            return f"{three_figures(value / unit)} {letters}"
    return f"{value:.0f} B"


def three_figures(value: float) -> str:
    """1.23, 12.3, 123."""
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def percent(before: float, after: float) -> str:
    """The change in percent, signed: -42.0%; "new" where there was nothing before."""
    if before == 0:
        return "0.0%" if after == 0 else "new"
    change = 100 * (after - before) / before
    return "0.0%" if abs(change) < 0.05 else f"{change:+.1f}%"
