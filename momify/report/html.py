"""report.html: one file that needs nothing else, from the dict of report.json."""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from momify.report.charts import Chart, line_chart
from momify.report.tasks import comparison_table, protocol_lines
from momify.report.words import (
    FROM_THE_SOURCE,
    FROM_THE_SOURCE_HEAD,
    Json,
    amount,
    percent,
    perplexity_percent,
    perplexity_text,
    quality_numbers,
    size,
    three_figures,
)

Show = Callable[[float], str]
KINDS = {"mha": "attention", "ffn": "feed-forward"}
PARTS = {  # what a stack calls its parts, and the colour that stands for each
    "embeddings": ("embeddings", 0), "head": ("output head", 1), "projections": ("attention projections", 2),
    "attention": ("attention core", 3), "ffn": ("feed-forward", 4), "norms": ("norms", 5), "routers": ("routers", 6),
    "patches": ("patches of SKIP", 7), "deltas": ("step deltas", 8),
    "weights": ("weights", 4), "kv": ("KV cache", 3), "activations": ("activations", 5),
}  # fmt: skip


def environment() -> Environment:
    """Templates of the package; whatever is put in is text, never markup, and nothing may be missing."""
    env = Environment(
        loader=PackageLoader("momify.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"amount": amount, "size": size, "three": three_figures}
    env.globals["inline"] = lambda name: Markup(env.loader.get_source(env, name)[0])
    return env


def content_policy(script: str) -> str:
    """A Content-Security-Policy under which a page asks nobody for anything and runs this one script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


def render_html(report: Json) -> str:
    """report.html for a report of `build_report`."""
    env = environment()
    script = env.loader.get_source(env, "report.js")[0]
    return env.get_template("report.html.j2").render(
        report=report,
        policy=content_policy(script),
        script=Markup(script),
        tiles=_tiles(report),
        bars=_bars(report),
        stacks=_stacks(report),
        trust=[_trust(name, report["macs"][side]) for name, side in (("source", "source"), ("MoM", "mom"))],
        loads=_loads(report["memory"]),
        speed=None if report["speed"] is None else _speed(report["speed"]),
        quality=_quality(report["perplexity"]),
        from_the_source=(FROM_THE_SOURCE_HEAD, FROM_THE_SOURCE),
        tasks=comparison_table(report.get("tasks") or []),
        protocols=protocol_lines(report.get("tasks") or []),
        charts=_charts(report),
        heats=[] if report["routing"] is None else [_heat(report["routing"], kind) for kind in KINDS],
        facts=_facts(report["provenance"]),
        recipe=json.dumps(report["provenance"]["recipe"], indent=2, ensure_ascii=False),
    )


def _both(report: Json, block: str, key: str) -> tuple[float, float]:
    return tuple(report[block][side][key] for side in ("source", "mom"))


def _tiles(report: Json) -> list[Json]:
    """The few numbers that a reader takes away."""
    tiles = [
        _tile("Parameters", amount, *_both(report, "parameters", "total")),
        _tile("MACs", amount, *_both(report, "macs", "macs")),
        _tile("KV cache", size, *_both(report, "memory", "kv_bytes_per_token")),
    ]
    for run in (report["speed"] or {"runs": []})["runs"][:1]:
        for phase in ("prefill", "decode"):
            ratio = run[f"{phase}_ratio"]
            rates = (_rate(run[side][phase]["median"]) for side in ("source", "mom"))
            tone = "good" if ratio >= 1.02 else "bad" if ratio < 0.98 else "plain"
            label = {"prefill": "Reading a prompt", "decode": "Generating"}[phase]
            tiles.append({"name": label, "change": f"{ratio:.2f}x", "text": f"{' → '.join(rates)} tok/s", "tone": tone})
    found = report["perplexity"]
    after = found["mom_trained"] or found["mom_start"]
    change = perplexity_percent(found["source"], after)
    text = f"{perplexity_text(found['source'])} → {perplexity_text(after)}"
    tone = "good" if change.startswith("-") else "plain" if change == "0.0%" else "bad"
    return [*tiles, {"name": "Perplexity", "change": _minus(change) or "?", "text": text, "tone": tone}]


def _rate(value: float) -> str:
    """Tokens per second: three figures, or all of them with their commas."""
    return f"{value:,.0f}" if value >= 1000 else three_figures(value)


def _tile(name: str, show: Show, before: float, after: float) -> Json:
    tone = "good" if after < before else "plain"
    return {"name": name, "change": _minus(percent(before, after)), "text": f"{show(before)} → {show(after)}",
            "tone": tone}  # fmt: skip


def _minus(text: str) -> str:
    """A real minus sign: a hyphen is too short beside figures."""
    return text.replace("-", "\N{MINUS SIGN}")


def _bars(report: Json) -> list[Json]:
    """Before and after, the source being 100%."""
    memory = report["memory"]
    rows = [
        ("Parameters", amount, _both(report, "parameters", "total")),
        (f"Weights, {memory['dtype']}", size, _both(report, "memory", "weight_bytes")),
        ("MACs per input", amount, _both(report, "macs", "macs")),
        ("KV cache per token", size, _both(report, "memory", "kv_bytes_per_token")),
    ]
    pairs = zip(memory["source"]["loads"], memory["mom"]["loads"], strict=True)
    rows += [
        (f"Memory, {_load_name(old)}", size, (old["total"]["measured"], new["total"]["measured"])) for old, new in pairs
    ]
    return [_bar(name, show, *both) for name, show, both in rows]


def _bar(name: str, show: Show, before: float, after: float) -> Json:
    most = max(before, after) or 1
    return {"name": name, "before": show(before), "after": show(after), "change": _minus(percent(before, after)),
            "before_width": 100 * before / most, "after_width": 100 * after / most}  # fmt: skip


def _load_name(load: Json) -> str:
    words = f"prompt of {load['tokens']:,}" if load["phase"] == "prompt" else f"decoding after {load['tokens']:,}"
    return f"{words}, batch {load['batch']}"


def _stacks(report: Json) -> list[Json]:
    """Where MACs and bytes go, part by part, both models on one scale."""
    itemsize = report["memory"]["source"]["weight_bytes"] / report["parameters"]["source"]["total"]
    macs = [report["macs"][side]["parts"] for side in ("source", "mom")]
    weights = [
        {part: itemsize * count for part, count in report["parameters"][side].items() if part != "total"}
        for side in ("source", "mom")
    ]
    shape = f"{report['macs']['batch']} x {report['macs']['tokens']} tokens"
    stacks = [
        _stack("MACs", f"multiply-adds of one forward pass on {shape}; FLOPs are twice as many", amount, *macs),
        _stack("Weights", f"bytes in {report['memory']['dtype']}", size, *weights),
    ]
    loads = [report["memory"][side]["loads"] for side in ("source", "mom")]
    if loads[0]:
        largest = max(range(len(loads[0])), key=lambda index: loads[0][index]["total"]["measured"])
        parts = [{part: side[largest][part]["measured"] for part in ("weights", "kv", "activations")} for side in loads]
        stacks.append(_stack("Memory at its peak", f"{_load_name(loads[0][largest])}; measured", size, *parts))
    return stacks


def _stack(title: str, note: str, show: Show, before: dict[str, float], after: dict[str, float]) -> Json:
    most = max(sum(before.values()), sum(after.values()))
    rows = []
    for part in before:
        name, colour = PARTS[part]
        name = "attention" if title == "Weights" and part == "attention" else name
        if before[part] or after[part]:
            rows.append({"name": name, "colour": colour, "before": show(before[part]), "after": show(after[part]),
                         "change": _minus(percent(before[part], after[part])),
                         "widths": (100 * before[part] / most, 100 * after[part] / most)})  # fmt: skip
    totals = (sum(before.values()), sum(after.values()))
    return {"title": title, "note": note, "rows": rows, "totals": [show(total) for total in totals],
            "change": _minus(percent(*totals))}  # fmt: skip


def _trust(name: str, side: Json) -> Json:
    """The three counts of one model, and what fvcore left out, by class."""
    ways = {"closed_form": "closed form", "fvcore": "fvcore", "torch": "torch FlopCounterMode"}
    classes = {"elementwise": "arithmetic, but no product", "movement": "no arithmetic", "unknown": "unknown"}
    listed = {
        words: [op["operator"].removeprefix("aten::") for op in side["unsupported"] if op["kind"] == kind]
        for kind, words in classes.items()
    }
    rows = [(label, side["ways"][key]) for key, label in ways.items() if key in side["ways"]]
    return {"name": name, "rows": rows, "agree": side["agree"], "difference": side["largest_difference"],
            "operators": {words: names for words, names in listed.items() if names}}  # fmt: skip


def _loads(memory: Json) -> list[Json]:
    """One row a load and model: each part as measured, and how far the closed form lies from it."""
    return [
        {"name": _load_name(old), "model": name, "first": index == 0,
         "cells": [_beside(load[part]) for part in ("weights", "kv", "activations", "total")]}
        for old, new in zip(memory["source"]["loads"], memory["mom"]["loads"], strict=True)
        for index, (name, load) in enumerate((("source", old), ("MoM", new)))
    ]  # fmt: skip


def _beside(found: Json) -> tuple[str, str]:
    off = (found["formula"] - found["measured"]) / found["measured"] if found["measured"] else 0
    return size(found["measured"]), f"formula {size(found['formula'])}" if abs(off) >= 0.005 else "formula the same"


def _speed(speed: Json) -> list[Json]:
    """A row a batch size and phase: two bars on one scale, each with the range over the rounds."""
    rows = []
    for run in speed["runs"]:
        for phase, label in (("prefill", "reading a prompt"), ("decode", "generating")):
            most = max(run[side][phase]["high"] for side in ("source", "mom"))
            bars = [
                {"model": name, "rate": _rate(run[side][phase]["median"]),
                 "range": " to ".join(_rate(run[side][phase][end]) for end in ("low", "high")),
                 **{end: 100 * run[side][phase][end] / most for end in ("median", "low", "high")}}
                for name, side in (("source", "source"), ("MoM", "mom"))
            ]  # fmt: skip
            ratio = run[f"{phase}_ratio"]
            rows.append({"name": f"{label}, batch {run['batch']}", "bars": bars, "ratio": f"{ratio:.2f}x",
                         "tone": "good" if ratio >= 1.02 else "bad" if ratio < 0.98 else "plain"})  # fmt: skip
    return rows


def _quality(found: Json) -> list[tuple[str, ...]]:
    names = {"source": "source", "mom_start": "MoM as converted", "mom_trained": "MoM, trained"}
    rows = []
    for key, name in names.items():
        if found[key] is not None:
            change = "" if key == "source" else _minus(perplexity_percent(found["source"], found[key]))
            rows.append((name, perplexity_text(found[key]), change, *quality_numbers(found[key])))
    return rows


def _charts(report: Json) -> list[tuple[str, str, Chart]]:
    """Title, unit and chart of each that there are points for."""
    training = report["training"]
    if training is None:
        return []
    curves, source = training["curves"], report["perplexity"]["source"]["loss"]
    trained = "training" if training["splice"] == 1 else f"training, on {training['splice']} pieces of text a block"
    shown = [
        ("Next-token loss", "nats per token", line_chart(
            {"held out": curves["held_out_loss"], trained: curves["next_token_loss"]},
            None if source is None else ("source, held out", source))),
        ("Distance from the source", "KL divergence, nats per token", line_chart(
            {"distillation": curves["distillation_loss"]})),
        ("Distance from the source's residuals", "squared error over their variance, mean over depths", line_chart(
            {"hidden": curves["hidden_loss"]})),
        ("Router entropy", "nats, mean over routed half-steps", line_chart({"entropy": curves["router_entropy"]})),
    ]  # fmt: skip
    return [(title, unit, chart) for title, unit, chart in shown if chart]


def _heat(routing: Json, kind: str) -> Json:
    """One pool: a row a step that has a choice or runs, a column a module, and SKIP."""
    pool, halves = routing[kind], [half for half in routing["steps"] if half["kind"] == kind]
    skip = len(pool["loads"])
    idle = [half["step"] for half in halves if half["choices"] == 1 and half["home"] == skip]
    rows = [
        {"step": half["step"], "fixed": half["choices"] == 1, "skip": half["skip_share"], "entropy": half["entropy"],
         "cells": [_cell(share, choice == half["home"]) for choice, share in enumerate(half["shares"])]}
        for half in halves if half["step"] not in idle
    ]  # fmt: skip
    even = 1 / skip
    loads = [{"share": load, "height": min(100, 50 * load / even), "dead": module in pool["dead"]}
             for module, load in enumerate(pool["loads"])]  # fmt: skip
    patched = [half["step"] for half in halves if half["patched"]]
    return {"name": KINDS[kind], "modules": skip, "rows": rows, "idle": idle, "patched": patched, "loads": loads,
            "dead": pool["dead"], "imbalance": pool["imbalance"]}  # fmt: skip


def _cell(share: float, home: bool) -> Json:
    text = "" if share < 0.005 else f"{100 * share:.0f}"
    return {"text": text, "share": share, "strength": round(100 * min(1.0, share) ** 0.6), "home": home}


def _facts(found: Json) -> Sequence[tuple[str, Any]]:
    return [
        ("source", found["source"]),
        ("its SHA-256", found["source_sha256"]),
        ("seed", found["seed"]),
        ("commit", found["commit"] or "not from a checkout"),
        *found["versions"].items(),
        *found["machine"].items(),
    ]
