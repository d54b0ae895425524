"""report.md: the report as tables for a pull request or a model card."""

import json
import re
from collections.abc import Callable, Sequence

from momify.report.words import Json, amount, percent, perplexity_percent, perplexity_text, size, three_figures


def escape(text: object) -> str:
    """A foreign string as plain text in Markdown: no table column, tag, link, image or emphasis can start in it."""
    flat = " ".join(str(text).split())
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        flat = flat.replace(sign, entity)
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", flat)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers (all columns but the first) to the right; cells are written as they come."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fenced(text: str, language: str = "") -> str:
    """`text` as a code block whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def render_markdown(report: Json) -> str:
    """report.md for a report of `build_report`."""
    sections = [
        f"# {escape(report['source'])} as a Mixture of Modules",
        f"**{escape(report['verdict'])}.**",
        _overview(report),
        _quality(report["perplexity"]),
        _macs(report["macs"]),
        _speed(report["speed"]),
        _routing(report["routing"]),
        _provenance(report["provenance"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _overview(report: Json) -> str:
    parameters, memory, macs = report["parameters"], report["memory"], report["macs"]
    rows = [
        _change("parameters", amount, *(parameters[side]["total"] for side in ("source", "mom"))),
        _change(f"weights, {memory['dtype']}", size, *(memory[side]["weight_bytes"] for side in ("source", "mom"))),
        _change("MACs per input", amount, *(macs[side]["macs"] for side in ("source", "mom"))),
        _change("FLOPs per input (2 x MACs)", amount, *(macs[side]["flops"] for side in ("source", "mom"))),
        _change(
            f"KV cache per token, {memory['dtype']}",
            size,
            *(memory[side]["kv_bytes_per_token"] for side in ("source", "mom")),
        ),
    ]
    return table(["", "source", "MoM", "change"], rows)


def _change(name: str, show: Callable[[float], str], before: float, after: float) -> list[str]:
    return [name, show(before), show(after), percent(before, after)]


def _quality(perplexity: Json) -> str:
    source = perplexity["source"]
    names = (("source", "source"), ("MoM at step 0", "mom_start"), ("MoM after training", "mom_trained"))
    rows = [_quality_row(name, source, perplexity[key]) for name, key in names]
    lines = ["## Perplexity", f"Protocol: {escape(perplexity['protocol'])}."]
    return "\n\n".join([*lines, table(["model", "perplexity", "change", "loss, nats", "bits per byte"], rows)])


def _quality_row(name: str, source: Json, found: Json | None) -> list[str]:
    change = "" if found is source else perplexity_percent(source, found)
    numbers = [_decimals(found, key) for key in ("loss", "bits_per_byte")]
    return [name, perplexity_text(found), change, *numbers]


def _decimals(found: Json | None, key: str) -> str:
    return "" if found is None or found[key] is None else f"{found[key]:.4f}"


def _macs(macs: Json) -> str:
    source, mom = macs["source"], macs["mom"]
    rows = [_change(part, amount, before, mom["parts"][part]) for part, before in source["parts"].items()]
    rows.append(_change("all", amount, source["macs"], mom["macs"]))
    shape = f"{macs['batch']} x {macs['tokens']} tokens"
    intro = (
        f"Multiply-adds of one forward pass on {shape}, without cache; closed form with the routing of each of "
        f"{macs['inputs']} inputs, averaged: the MoM's lie between {amount(mom['low'])} and {amount(mom['high'])}."
    )
    parts = table(["part", "source", "MoM", "change"], rows)
    return "\n\n".join(["## MACs", intro, parts, _agreement("source", source), _agreement("MoM", mom)])


def _agreement(name: str, side: Json) -> str:
    """The three counts of one model, and in plain words whether they can be trusted."""
    rows = [
        [f"{name}, input {number}", *(f"{count[way]:,.0f}" for way in ("closed_form", "fvcore", "torch"))]
        for number, count in enumerate(side["counters"], start=1)
    ]
    difference = f"{100 * side['largest_difference']:.2f}%"
    agreed = f"The three counts of the {name} agree (largest difference {difference})."
    if not side["agree"]:
        agreed = f"**The three counts of the {name} DO NOT AGREE (largest difference {difference}).**"
    left_out = [op["operator"] for op in side["unsupported"] if op["arithmetic"]]
    listed = f" Not counted by fvcore, as they hold no product: {escape(', '.join(left_out))}." if left_out else ""
    unknown = [op["operator"] for op in side["unsupported"] if op["kind"] == "unknown"]
    if unknown:
        listed = f" **fvcore cannot count {escape(', '.join(unknown))}, which may hold products.**"
    return table(["", "closed form", "fvcore", "torch"], rows) + f"\n\n{agreed}{listed}"


def _speed(speed: Json | None) -> str:
    if speed is None:
        return ""
    rows = [
        [
            name,
            *(_rate(speed[side][name]) for side in ("source", "mom")),
            f"{speed[f'{name}_ratio']:.2f}x",
        ]
        for name in ("prefill", "decode")
    ]
    where = f"{escape(speed['device'])}, {escape(speed['dtype'])}, CPU threads: {speed['threads']}"
    intro = f"Tokens per second, median (slowest to fastest); {escape(speed['protocol'])}; on {where}."
    return "\n\n".join(["## Speed", intro, table(["", "source", "MoM", "ratio"], rows)])


def _rate(spread: Json) -> str:
    median, low, high = (three_figures(spread[key]) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _routing(routing: Json | None) -> str:
    if routing is None:
        return ""
    kinds = {"mha": "attention", "ffn": "feed-forward"}
    rows = [
        [f"{half['step']}, {kinds[half['kind']]}", *_half_cells(half)]
        for half in routing["steps"]
        if half["choices"] > 1
    ]
    lines = [_pool_line(name, routing[kind]) for kind, name in kinds.items()]
    intro = f"Over {routing['tokens']:,} tokens. " + " ".join(lines)
    head = ["step", "home", "most used", "its share", "SKIP share", "entropy, bits"]
    steps = table(head, rows) if rows else "No step has a choice: routing is fixed."
    return "\n\n".join(["## Routing", intro, steps])


def _half_cells(half: Json) -> list[str]:
    shares = half["shares"]
    skip = len(shares) - 1
    busiest = max(range(len(shares)), key=shares.__getitem__)
    home, most = ("SKIP" if choice == skip else str(choice) for choice in (half["home"], busiest))
    return [home, most, f"{shares[busiest]:.1%}", f"{half['skip_share']:.1%}", f"{half['entropy']:.2f}"]


def _pool_line(name: str, pool: Json) -> str:
    dead = f"never used: {', '.join(map(str, pool['dead']))}" if pool["dead"] else "every module is used"
    return f"{name.capitalize()}: {dead}, busiest module {pool['imbalance']:.2f} times the mean."


def _provenance(found: Json) -> str:
    rows = [
        ["source", escape(found["source"])],
        ["its SHA-256", escape(found["source_sha256"])],
        ["seed", escape(found["seed"])],
        ["commit", escape(found["commit"] or "not from a checkout")],
        *([name, escape(value)] for name, value in found["versions"].items()),
        *([escape(name), escape(value)] for name, value in found["machine"].items()),
    ]
    sections = ["## Provenance", table(["", ""], rows), *(escape(note) for note in found["notes"])]
    if found["command"]:
        sections += ["Made by", fenced(found["command"])]
    if found["recipe"]:
        sections += ["Recipe", fenced(json.dumps(found["recipe"], indent=2, ensure_ascii=False), "json")]
    return "\n\n".join(sections)
