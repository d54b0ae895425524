"""report.html: one file that needs nothing else, from the dict of report.json."""

import base64
import hashlib
import json

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from momify.amounts import amount, size, three_figures
from momify.report.charts import Chart, line_chart
from momify.report.rows import (
    MODELS,
    OPERATORS,
    Change,
    Show,
    fact_rows,
    load_rows,
    operator_lines,
    part_rows,
    quality_rows,
    rate,
    rate_range,
    size_rows,
    speed_rows,
    way_rows,
)
from momify.report.tasks import comparison_table, protocol_lines
from momify.report.words import (
    FROM_THE_SOURCE,
    FROM_THE_SOURCE_HEAD,
    KINDS,
    LIKE_FOR_LIKE,
    PHASES,
    Json,
    load_name,
    perplexity_percent,
    perplexity_text,
    saves,
    speed_tone,
)

COLOURS = {  # one a part, as far as they stand in one stack
    "embeddings": 0, "head": 1, "projections": 2, "attention": 3, "ffn": 4, "norms": 5, "routers": 6, "patches": 7,
    "deltas": 8, "weights": 4, "kv": 3, "activations": 5,
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
        ways=way_rows(report["macs"]),
        trust=[_trust(name, report["macs"][side]) for side, name in MODELS.items()],
        loads=load_rows(report["memory"]),
        like_for_like=LIKE_FOR_LIKE,
        speed=None if report["speed"] is None else _speed(report["speed"]),
        quality=_quality(report["perplexity"]),
        from_the_source=(FROM_THE_SOURCE_HEAD, FROM_THE_SOURCE),
        tasks=comparison_table(report.get("tasks") or []),
        protocols=protocol_lines(report.get("tasks") or []),
        charts=_charts(report),
        heats=[] if report["routing"] is None else [_heat(report["routing"], kind) for kind in KINDS],
        facts=fact_rows(report["provenance"]),
        recipe=json.dumps(report["provenance"]["recipe"], indent=2, ensure_ascii=False),
    )


def _tiles(report: Json) -> list[Json]:
    """The few numbers that a reader takes away."""
    parameters, _, macs, cache = size_rows(report)
    tiles = [_tile(name, row) for name, row in (("Parameters", parameters), ("MACs", macs), ("KV cache", cache))]
    if report["speed"]:
        for label, row in zip(PHASES.values(), speed_rows(report["speed"]), strict=False):  # of batch 1
            rates = " → ".join(rate(spread["median"]) for spread in row.spreads.values())
            tiles.append({"name": label.capitalize(), "change": f"{row.ratio:.2f}x", "text": f"{rates} tok/s",
                          "tone": speed_tone(row.ratio)})  # fmt: skip
    found = report["perplexity"]
    after = found["mom_trained"] or found["mom_start"]
    change = perplexity_percent(found["source"], after)
    text = f"{perplexity_text(found['source'])} → {perplexity_text(after)}"
    tone = "good" if change.startswith("-") else "plain" if change == "0.0%" else "bad"
    return [*tiles, {"name": "Perplexity", "change": _minus(change) or "?", "text": text, "tone": tone}]


def _tile(name: str, row: Change) -> Json:
    _, before, after, change = row.cells()
    tone = "good" if saves(row.before, row.after) else "plain"
    return {"name": name, "change": _minus(change), "text": f"{before} → {after}", "tone": tone}


def _minus(text: str) -> str:
    """A real minus sign: a hyphen is too short beside figures."""
    return text.replace("-", "\N{MINUS SIGN}")


def _bars(report: Json) -> list[Json]:
    """Before and after, the larger being the whole width."""
    pairs = zip(*(report["memory"][side]["loads"] for side in MODELS), strict=True)
    loads = [
        Change(f"Memory, {load_name(old)}", size, old["total"]["measured"], new["total"]["measured"])
        for old, new in pairs
    ]
    return [_bar(row, max(row.before, row.after) or 1) for row in (*size_rows(report), *loads)]


def _bar(row: Change, most: float) -> Json:
    """A row with its widths, in per cent of `most`."""
    name, before, after, change = row.cells()
    return {"name": name, "before": before, "after": after, "change": _minus(change),
            "widths": (100 * row.before / most, 100 * row.after / most)}  # fmt: skip


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
        stacks.append(_stack("Memory at its peak", f"{load_name(loads[0][largest])}; measured", size, *parts))
    return stacks


def _stack(title: str, note: str, show: Show, before: dict[str, float], after: dict[str, float]) -> Json:
    whole = Change("all", show, sum(before.values()), sum(after.values()))
    most, (_, *totals, change) = max(whole.before, whole.after), whole.cells()
    rows = [_bar(row, most) | {"colour": COLOURS[part]} for part, row in part_rows(show, before, after).items()]
    return {"title": title, "note": note, "rows": rows, "totals": totals, "change": _minus(change)}


def _trust(name: str, side: Json) -> Json:
    """Whether the three counts of one model agree, and what fvcore left out, by class."""
    operators = {OPERATORS[kind]: names for kind, names in operator_lines(side).items()}
    return {"name": name, "agree": side["agree"], "difference": side["largest_difference"], "operators": operators}


def _speed(speed: Json) -> list[Json]:
    """A row a batch size and phase: two bars on one scale, each with the range over the rounds."""
    rows = []
    for row in speed_rows(speed):
        most = max(spread["high"] for spread in row.spreads.values())
        bars = [
            {"model": MODELS[side], "rate": rate(spread["median"]), "range": rate_range(spread),
             **{end: 100 * spread[end] / most for end in ("median", "low", "high")}}
            for side, spread in row.spreads.items()
        ]  # fmt: skip
        rows.append({"name": row.name, "bars": bars, "ratio": f"{row.ratio:.2f}x", "tone": speed_tone(row.ratio)})
    return rows


def _quality(found: Json) -> list[list[str]]:
    return [[name, text, _minus(change), *numbers] for name, text, change, *numbers in quality_rows(found)]


def _charts(report: Json) -> list[tuple[str, str, Chart]]:
    """Title, unit and chart of each that there are points for."""
    training = report["training"]
    if training is None:
        return []
    curves = training["curves"]
    trained = "training" if training["splice"] == 1 else f"training, on {training['splice']} pieces of text a block"
    shown = [
        ("Next-token loss", "nats per token", line_chart(
            {"held out": curves["held_out_loss"], trained: curves["next_token_loss"]},
            _level(report["perplexity"]))),
        ("Distance from the source", "KL divergence, nats per token", line_chart(
            {"distillation": curves["distillation_loss"]})),
        ("Distance from the source's residuals", "squared error over their variance, mean over depths", line_chart(
            {"hidden": curves["hidden_loss"]})),
        ("Router entropy", "nats, mean over routed half-steps", line_chart({"entropy": curves["router_entropy"]})),
    ]  # fmt: skip
    return [(title, unit, chart) for title, unit, chart in shown if chart]


def _level(perplexity: Json) -> tuple[str, float] | None:
    """The source's loss as a line among the curves, where it was taken on their text."""
    loss = perplexity["source"]["loss"]
    if loss is None or not perplexity["own_text"]:
        return None
    return "source, held out" + (" (limited)" if perplexity["limited"] else ""), loss


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
