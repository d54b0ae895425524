"""The report in words: numbers with their units, and the verdict in one line."""

from typing import Any

Json = dict[str, Any]

NOT_FASTER = 1.02  # a gain within 2% is noise, not speed
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
        if abs(value) >= unit:
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


def perplexity_text(found: Json | None) -> str:
    """Perplexity with two decimals; words where there is none or it is not finite."""
    if found is None:
        return "not measured"
    return "not finite" if found["perplexity"] is None else f"{found['perplexity']:.2f}"


def perplexity_percent(before: Json, after: Json | None) -> str:
    """The change of perplexity in percent, empty where one of them is no number."""
    if after is None or before["perplexity"] is None or after["perplexity"] is None:
        return ""
    return percent(before["perplexity"], after["perplexity"])


def verdict(report: Json) -> str:
    """What the conversion brought, in one line: each number before -> after, then what did not get better."""
    sizes = _sizes(report)
    changes = [f"{name} {show(a)} -> {show(b)} ({percent(a, b)})" for name, show, a, b in sizes]
    changes.append(_perplexity_change(report["perplexity"]))
    unsaved = [f"{name}: nothing saved" for name, _, before, after in sizes if after >= before]
    warnings = [*unsaved, *_slower(report["speed"]), *_untaught(report["perplexity"]), *_doubts(report["macs"])]
    return ", ".join(changes) + "".join(f"; {line}" for line in warnings)


def _sizes(report: Json) -> list[tuple]:
    """Name, way of showing, before, after: for each thing that a MoM is meant to make smaller."""
    parameters, macs, memory = report["parameters"], report["macs"], report["memory"]
    return [
        ("parameters", amount, parameters["source"]["total"], parameters["mom"]["total"]),
        ("MACs", amount, macs["source"]["macs"], macs["mom"]["macs"]),
        ("KV cache per token", size, memory["source"]["kv_bytes_per_token"], memory["mom"]["kv_bytes_per_token"]),
    ]


def _perplexity_change(perplexity: Json) -> str:
    before, trained = perplexity["source"], perplexity["mom_trained"]
    after = trained or perplexity["mom_start"]
    change = perplexity_percent(before, after)
    line = f"perplexity {perplexity_text(before)} -> {perplexity_text(after)}" + (f" ({change})" if change else "")
    return line if trained else f"{line}, not trained yet"


def _slower(speed: Json | None) -> list[str]:
    if speed is None:
        return []
    ratios = {"prefill": speed["prefill_ratio"], "decode": speed["decode_ratio"]}
    return [f"{name} is not faster ({ratio:.2f}x)" for name, ratio in ratios.items() if ratio < NOT_FASTER]


def _untaught(perplexity: Json) -> list[str]:
    """Whether training was in vain."""
    start, trained = perplexity["mom_start"], perplexity["mom_trained"]
    if trained is None or trained["perplexity"] is None:
        return []
    if start["perplexity"] is None or trained["perplexity"] < start["perplexity"]:
        return []
    return [f"training did not lower perplexity ({perplexity_text(start)} before it)"]


def _doubts(macs: Json) -> list[str]:
    wrong = [name for name, side in (("source", "source"), ("MoM", "mom")) if not macs[side]["agree"]]
    return [f"the three MAC counts of the {name} do not agree" for name in wrong]
