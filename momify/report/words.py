"""The report in words: what was found, and the verdict in one line."""

from typing import Any

from momify.amounts import amount, percent, size

Json = dict[str, Any]

NOT_FASTER = 1.02  # a gain within 2% is noise, not speed; so is a loss
KINDS = {"mha": "attention", "ffn": "feed-forward"}
PHASES = {"prefill": "reading a prompt", "decode": "generating"}
LIKE_FOR_LIKE = (
    "The source is measured as a MoM that leaves nothing out, by the same operators and with the same cache, so that "
    "what differs is what was removed. transformers' own GPT-2 is a little slower (docs/speed.md); it holds more while "
    "it reads a prompt, and less while it generates, as its cache has no room to grow into."
)


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
    unsaved = [f"{name}: {saved(a, b)}" for name, _, a, b in sizes if not saves(a, b)]
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


def saves(before: float, after: float) -> bool:
    """Whether after is so much less that it shows in whole per cent."""
    return after < before * 0.995


def saved(before: float, after: float) -> str:
    """How much is saved, in words: 31% saved."""
    if saves(before, after):
        return f"{1 - after / before:.0%} saved"
    return "less than 1% saved" if percent(before, after).startswith("-") else "nothing saved"


def _perplexity_change(perplexity: Json) -> str:
    before, trained = perplexity["source"], perplexity["mom_trained"]
    after = trained or perplexity["mom_start"]
    change = perplexity_percent(before, after)
    line = f"perplexity {perplexity_text(before)} -> {perplexity_text(after)}" + (f" ({change})" if change else "")
    line += "" if perplexity["own_text"] else " (other text)"
    line += " (limited)" if perplexity["limited"] else ""
    return line if trained else f"{line}, not trained yet"


def _slower(speed: Json | None) -> list[str]:
    if speed is None:
        return []
    ratios = [(f"{name} at batch {batch}", ratio) for batch, name, ratio in speed_ratios(speed)]
    return [f"{name} is not faster ({ratio:.2f}x)" for name, ratio in ratios if ratio < NOT_FASTER]


def speed_tone(ratio: float) -> str:
    """Good for a gain, bad for a loss, plain for what is neither."""
    return "good" if ratio >= NOT_FASTER else "bad" if ratio * NOT_FASTER < 1 else "plain"


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
    return _saving(_NAMES[name], f"{show(before)} -> {show(after)} {_UNITS[name]}", before, after)


def _saving(what: str, change: str, before: float, after: float) -> Json:
    tone = "good" if saves(before, after) else "plain"
    return {"tone": tone, "text": f"{what}: {saved(before, after)}, {change}."}


def _load_findings(memory: Json) -> list[Json]:
    """What the largest load of each phase needs altogether, weights and all."""
    found = []
    for before, after in zip(memory["source"]["loads"], memory["mom"]["loads"], strict=True):
        if before["batch"] != max(load["batch"] for load in memory["source"]["loads"]):
            continue
        old, new = before["total"]["measured"], after["total"]["measured"]
        found.append(_saving(f"Memory at its peak, {load_name(before)}", f"{size(old)} -> {size(new)}", old, new))
    return found


def load_name(load: Json) -> str:
    """Which pass: batch 8, prompt of 1,023."""
    what = "prompt of" if load["phase"] == "prompt" else "decoding after"
    return f"batch {load['batch']}, {what} {load['tokens']:,}"


def _speed_findings(speed: Json | None) -> list[Json]:
    """Decode: 1.31x as fast at batch 1, not faster at batch 8 (0.98x)."""
    if speed is None:
        return []
    found = []
    for phase, label in PHASES.items():
        ratios = [(batch, ratio) for batch, name, ratio in speed_ratios(speed) if name == phase]
        parts = [
            f"{ratio:.2f}x as fast at batch {batch}"
            if ratio >= NOT_FASTER
            else f"not faster at batch {batch} ({ratio:.2f}x)"
            for batch, ratio in ratios
        ]
        tones = {speed_tone(ratio) for _, ratio in ratios}
        tone = tones.pop() if len(tones) == 1 else "plain" if "good" in tones else "bad"
        found.append({"tone": tone, "text": f"{label.capitalize()}: {', '.join(parts)}."})
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
            for kind, name in KINDS.items() if routing[kind]["dead"]]  # fmt: skip
    used = [{"tone": "bad", "text": f"Modules that no token ran: {'; '.join(dead)}."}] if dead else []
    return [{"tone": "plain", "text": text}, *used]
