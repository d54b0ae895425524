"""report.md: the report as tables for a pull request or a model card."""

import json
import re
from collections.abc import Callable, Sequence

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
        "\n".join(f"- {escape(found['text'])}" for found in report["findings"]),
        _overview(report),
        _quality(report["perplexity"]),
        _tasks(report.get("tasks")),
        _training(report["training"]),
        _macs(report["macs"]),
        _memory(report["memory"]),
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
    lines = ["## Perplexity", f"Protocol: {escape(perplexity['protocol'])}. {FROM_THE_SOURCE}"]
    head = ["model", "perplexity", "change", "loss, nats", "bits per byte", *FROM_THE_SOURCE_HEAD]
    return "\n\n".join([*lines, table(head, rows)])


def _tasks(tasks: list[Json] | None) -> str:
    """What `momify eval` found, and how."""
    if not tasks:
        return ""
    columns, rows = comparison_table(tasks)
    cells = table([escape(column) for column in columns], [[escape(cell) for cell in row] for row in rows])
    lines = "\n".join(f"- {escape(line)}" for line in protocol_lines(tasks))
    return "\n\n".join(["## Tasks", cells, lines])


def _quality_row(name: str, source: Json, found: Json | None) -> list[str]:
    change = "" if found is source else perplexity_percent(source, found)
    return [name, perplexity_text(found), change, *quality_numbers(found)]


def _training(training: Json | None) -> str:
    """One line; the curves are in report.html."""
    if training is None:
        return ""
    tokens = f", {amount(training['tokens'])} tokens" if training["tokens"] else ""
    held_out = training["curves"]["held_out_loss"]
    ends = f"; held-out loss {held_out[0][1]:.3f} -> {held_out[-1][1]:.3f} nats per token" if held_out else ""
    return f"Trained for {training['steps']:,} steps{tokens}{escape(ends)}."


def _macs(macs: Json) -> str:
    source, mom = macs["source"], macs["mom"]
    pairs = [(part, before, mom["parts"][part]) for part, before in source["parts"].items()]
    rows = [_change(part, amount, before, after) for part, before, after in pairs if before or after]
    rows.append(_change("all", amount, source["macs"], mom["macs"]))
    shape = f"{macs['batch']} x {macs['tokens']} tokens"
    intro = (
        f"Multiply-adds of one forward pass on {shape}, without cache: the closed form with the routing of each of "
        f"{macs['inputs']} inputs, averaged."
    )
    parts = table(["part", "source", "MoM", "change"], rows)
    both = (("source", source), ("MoM", mom))
    ways = [row for name, side in both for row in _ways(name, side)]
    counts = table(["", "inputs", "mean", "least", "most", "deviation"], ways)
    return "\n\n".join(["## MACs", intro, parts, counts, *(_agreement(name, side) for name, side in both)])


def _ways(name: str, side: Json) -> list[list[str]]:
    """One row for each way of counting one model."""
    labels = {"closed_form": "closed form", "fvcore": "fvcore", "torch": "torch"}
    return [
        [
            f"{name}, {labels[way]}",
            str(found["inputs"]),
            f"{found['mean']:,.0f}",
            *(amount(found[key]) for key in ("low", "high", "deviation")),
        ]
        for way, found in side["ways"].items()
    ]


def _agreement(name: str, side: Json) -> str:
    """Whether the three counts of one model can be trusted, in plain words, and what fvcore left out, by class."""
    difference = f"{100 * side['largest_difference']:.2f}%"
    agreed = f"The three counts of the {name} agree (largest difference {difference})."
    if not side["agree"]:
        agreed = f"**The three counts of the {name} DO NOT AGREE (largest difference {difference}).**"
    listed = [_operators(words, kind, side) for words, kind in (
        ("Not counted by fvcore, arithmetic without a product", "elementwise"),
        ("Not counted by fvcore, no arithmetic", "movement"),
    )]  # fmt: skip
    unknown = [op["operator"] for op in side["unsupported"] if op["kind"] == "unknown"]
    if unknown:
        listed.append(f"**fvcore cannot count {escape(', '.join(unknown))}, which may hold products.**")
    return " ".join([agreed, *filter(None, listed)])


def _operators(words: str, kind: str, side: Json) -> str:
    names = [op["operator"].removeprefix("aten::") for op in side["unsupported"] if op["kind"] == kind]
    return f"{words}: {escape(', '.join(names))}." if names else ""


def _memory(memory: Json) -> str:
    """Each load of both models: measured, and the closed form in brackets."""
    rows = [
        [f"{_load_name(old)}, {name}", *(_beside(load[part]) for part in ("weights", "kv", "activations", "total"))]
        for old, new in zip(memory["source"]["loads"], memory["mom"]["loads"], strict=True)
        for name, load in (("source", old), ("MoM", new))
    ]
    if not rows:
        return ""
    intro = f"Measured ({escape(memory['method'])}; {escape(memory['dtype'])}), in brackets by formula."
    head = ["load", "weights", "KV cache", "activations at peak", "all"]
    return "\n\n".join(["## Memory", intro, table(head, rows)])


def _load_name(load: Json) -> str:
    words = f"prompt of {load['tokens']}" if load["phase"] == "prompt" else f"decoding after {load['tokens']}"
    return f"batch {load['batch']}, {words}"


def _beside(found: Json) -> str:
    return f"{size(found['measured'])} ({size(found['formula'])})"


def _speed(speed: Json | None) -> str:
    if speed is None:
        return ""
    rows = [
        [
            f"{name}, batch {run['batch']}",
            *(_rate(run[side][name]) for side in ("source", "mom")),
            f"{run[f'{name}_ratio']:.2f}x",
        ]
        for run in speed["runs"]
        for name in ("prefill", "decode")
    ]
    where = f"{escape(speed['device'])}, {escape(speed['dtype'])}, CPU threads: {speed['threads']}"
    protocols = "; ".join(escape(run["protocol"]) for run in speed["runs"])
    intro = f"Tokens per second of all sequences together, median (slowest to fastest); {protocols}; on {where}."
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
    lines += [_patch_line(name, routing["steps"], kind) for kind, name in kinds.items()]
    intro = f"Over {routing['tokens']:,} tokens. " + " ".join(filter(None, lines))
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


def _patch_line(name: str, halves: Sequence[Json], kind: str) -> str:
    """Where SKIP is more than nothing."""
    steps = [str(half["step"]) for half in halves if half["kind"] == kind and half["patched"]]
    return f"SKIP of {name} adds a patch at {', '.join(steps)}." if steps else ""


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
