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


FROM_THE_SOURCE_HEAD = ("divergence, nats", "same token")
FROM_THE_SOURCE = (
    "Divergence: the mean KL(source || MoM) of a scored token, 0 only for a model that predicts as its source does; a "
    "change of perplexity also counts what the source has wrong. Same token: how often both expect the same one."
)


def quality_numbers(found: Json | None) -> list[str]:
    """Loss and bits per byte, divergence and agreement, as they stand in a table; empty where not measured."""
    numbers = [found[key] if found else None for key in ("loss", "bits_per_byte", "divergence")]
    agreement = found["agreement"] if found else None
    decimals = ["" if number is None else f"{number:.4f}" for number in numbers]
    return [*decimals, "" if agreement is None else f"{agreement:.1f}%"]


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
    line += " (limited)" if perplexity.get("limited") else ""
    return line if trained else f"{line}, not trained yet"


def _slower(speed: Json | None) -> list[str]:
    if speed is None:
        return []
    ratios = [(f"{name} at batch {batch}", ratio) for batch, name, ratio in speed_ratios(speed)]
    return [f"{name} is not faster ({ratio:.2f}x)" for name, ratio in ratios if ratio < NOT_FASTER]


def speed_ratios(speed: Json) -> list[tuple[int, str, float]]:
    """(batch, phase, how many times as fast) for everything that was timed."""
    return [(run["batch"], phase, run[f"{phase}_ratio"]) for run in speed["runs"] for phase in ("prefill", "decode")]


def _untaught(perplexity: Json) -> list[str]:
    """Whether training was in vain."""
    start, trained = perplexity["mom_start"], perplexity["mom_trained"]
    if start is None or trained is None or trained["perplexity"] is None:
        return []
    if start["perplexity"] is None or trained["perplexity"] < start["perplexity"]:
        return []
    return [f"training did not lower perplexity ({perplexity_text(start)} before it)"]


def _doubts(macs: Json) -> list[str]:
    wrong = [name for name, side in (("source", "source"), ("MoM", "mom")) if not macs[side]["agree"]]
    return [f"the three MAC counts of the {name} do not agree" for name in wrong]


def findings(report: Json) -> list[Json]:
    """The verdict in sentences: `tone` good, bad or plain, and `text`; what is saved, where, and where not."""
    found = [_size_finding(name, *numbers) for name, *numbers in _sizes(report)]
    found += _load_findings(report["memory"]) + _speed_findings(report["speed"])
    found.append(_quality_finding(report["perplexity"]))
    found += _routing_findings(report["routing"])
    found += [{"tone": "bad", "text": _sentence(line)} for line in _untaught(report["perplexity"])]
    found += [{"tone": "bad", "text": _sentence(line)} for line in _doubts(report["macs"])]
    return found


def _sentence(line: str) -> str:
    return line[:1].upper() + line[1:] + "."


_NAMES = {"parameters": "Weights", "MACs": "Arithmetic", "KV cache per token": "KV cache"}
_UNITS = {"parameters": "parameters", "MACs": "MACs per input", "KV cache per token": "per token"}


def _size_finding(name: str, show: Any, before: float, after: float) -> Json:
    """Weights: 31% saved, 9.1 M -> 6.3 M parameters."""
    change = f"{show(before)} -> {show(after)} {_UNITS[name]}"
    if after < before:
        return {"tone": "good", "text": f"{_NAMES[name]}: {1 - after / before:.0%} saved, {change}."}
    return {"tone": "plain", "text": f"{_NAMES[name]}: nothing saved, {change}."}


def _load_findings(memory: Json) -> list[Json]:
    """What the largest load of each phase needs altogether, weights and all."""
    found = []
    for before, after in zip(memory["source"]["loads"], memory["mom"]["loads"], strict=True):
        if before["batch"] != max(load["batch"] for load in memory["source"]["loads"]):
            continue
        old, new = before["total"]["measured"], after["total"]["measured"]
        what = f"Memory at its peak, batch {before['batch']}, {_phase_words(before)}"
        saved = f"{1 - new / old:.0%} saved" if new < old else "nothing saved"
        tone = "good" if new < old else "plain"
        found.append({"tone": tone, "text": f"{what}: {saved}, {size(old)} -> {size(new)}."})
    return found


def _phase_words(load: Json) -> str:
    return f"prompt of {load['tokens']}" if load["phase"] == "prompt" else f"decoding after {load['tokens']}"


def _speed_findings(speed: Json | None) -> list[Json]:
    """Decode: 1.31x as fast at batch 1, not faster at batch 8 (0.98x)."""
    if speed is None:
        return []
    found = []
    for phase, label in (("prefill", "Reading a prompt"), ("decode", "Generating")):
        ratios = [(batch, ratio) for batch, name, ratio in speed_ratios(speed) if name == phase]
        parts = [
            f"{ratio:.2f}x as fast at batch {batch}"
            if ratio >= NOT_FASTER
            else f"not faster at batch {batch} ({ratio:.2f}x)"
            for batch, ratio in ratios
        ]
        faster = [ratio >= NOT_FASTER for _, ratio in ratios]
        tone = "good" if all(faster) else "plain" if any(faster) else "bad"
        found.append({"tone": tone, "text": f"{label}: {', '.join(parts)}."})
    return found


def _quality_finding(perplexity: Json) -> Json:
    before, trained = perplexity["source"], perplexity["mom_trained"]
    after = trained or perplexity["mom_start"]
    worse = None in (before["perplexity"], after["perplexity"]) or after["perplexity"] > before["perplexity"]
    return {"tone": "bad" if worse else "good", "text": _sentence(_perplexity_change(perplexity)) + apart(after)}


def apart(found: Json) -> str:
    """A sentence, after a space, on how far predictions are from the source's; none where they were not compared."""
    if found.get("divergence") is None:  # a report of before 2026-11-25 has no such key
        return ""
    return (
        f" Its predictions are {found['divergence']:.3f} nats per token from the source's; both expect the same "
        f"token {found['agreement']:.0f}% of the time."
    )


def _routing_findings(routing: Json | None) -> list[Json]:
    """Whether the routers choose anything, and what nobody uses."""
    free = [half for half in (routing or {"steps": []})["steps"] if half["choices"] > 1]
    if not free:
        return []
    away = sum(1 - min(1, half["shares"][half["home"]]) for half in free) / len(free)
    if away == 0:
        text = f"Routing: every token takes its step's home at all {len(free)} half-steps that could choose."
    else:
        skipped = sum(half["skip_share"] for half in free) / len(free)
        text = (
            f"Routing: at the {len(free)} half-steps that choose, {away:.1%} of the tokens leave their step's home, "
            f"{skipped:.1%} skip."
        )
    dead = [f"{name} {', '.join(map(str, routing[kind]['dead']))}"
            for kind, name in (("mha", "attention"), ("ffn", "feed-forward")) if routing[kind]["dead"]]  # fmt: skip
    used = [{"tone": "bad", "text": f"Modules that no token ran: {'; '.join(dead)}."}] if dead else []
    return [{"tone": "plain", "text": text}, *used]
