"""report.md: the report as tables for a pull request or a model card."""

import json
import re
from collections.abc import Sequence

from momify.amounts import amount
from momify.report.rows import (
    MODELS,
    OPERATORS,
    Change,
    change,
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
from momify.report.words import FROM_THE_SOURCE, FROM_THE_SOURCE_HEAD, KINDS, LIKE_FOR_LIKE, Json

BEFORE_AND_AFTER = ("source", "MoM", "change")


def escape(text: object) -> str:
    """A foreign string as plain text in Markdown: no table column, tag, link, image or emphasis can start in it."""
    flat = " ".join(str(text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;")
    flat = re.sub("^>", "&gt;", flat)  # elsewhere it quotes nothing, and `9 -> 4` is read as it stands
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
    rows = size_rows(report)
    rows.insert(3, change("FLOPs per input (2 x MACs)", amount, report, "macs", "flops"))
    return table(["", *BEFORE_AND_AFTER], [row.cells() for row in rows])


def _quality(perplexity: Json) -> str:
    lines = ["## Perplexity", f"Protocol: {escape(perplexity['protocol'])}. {FROM_THE_SOURCE}"]
    head = ["model", "perplexity", "change", "loss, nats", "bits per byte", *FROM_THE_SOURCE_HEAD]
    return "\n\n".join([*lines, table(head, quality_rows(perplexity))])


def _tasks(tasks: list[Json] | None) -> str:
    """What `momify eval` found, and how."""
    if not tasks:
        return ""
    columns, rows = comparison_table(tasks)
    cells = table([escape(column) for column in columns], [[escape(cell) for cell in row] for row in rows])
    lines = "\n".join(f"- {escape(line)}" for line in protocol_lines(tasks))
    return "\n\n".join(["## Tasks", cells, lines])


def _training(training: Json | None) -> str:
    """One line; the curves are in report.html."""
    if training is None:
        return ""
    tokens = f", {amount(training['tokens'])} tokens" if training["tokens"] else ""
    held_out = training["curves"]["held_out_loss"]
    places = held_out[:1] + held_out[1:][-1:]  # the first and the last, where they are two
    told = " -> ".join(f"{loss:.3f} (step {step:,})" for step, loss in places)
    ends = f"; held-out loss meanwhile {told} nats per token" if places else ""
    return f"Trained for {training['steps']:,} steps{tokens}{escape(ends)}."


def _macs(macs: Json) -> str:
    source, mom = (macs[side] for side in MODELS)
    rows = [
        *part_rows(amount, source["parts"], mom["parts"]).values(),
        Change("all", amount, source["macs"], mom["macs"]),
    ]
    intro = (
        f"Multiply-adds of one forward pass on {macs['batch']} x {macs['tokens']} tokens, without cache: the closed "
        f"form with the routing of each of {macs['inputs']} inputs, averaged."
    )
    parts = table(["part", *BEFORE_AND_AFTER], [row.cells() for row in rows])
    counts = table(["", "inputs", "mean", "least", "most", "deviation"], way_rows(macs))
    agreed = (_agreement(name, macs[side]) for side, name in MODELS.items())
    return "\n\n".join(["## MACs", intro, parts, counts, *agreed])


def _agreement(name: str, side: Json) -> str:
    """Whether the three counts of one model can be trusted, in plain words, and what fvcore left out, by class."""
    difference = f"{100 * side['largest_difference']:.2f}%"
    agreed = f"The three counts of the {name} agree (largest difference {difference})."
    if not side["agree"]:
        agreed = f"**The three counts of the {name} DO NOT AGREE (largest difference {difference}).**"
    listed = operator_lines(side)
    unknown = listed.pop("unknown", None)
    lines = [f"Not counted by fvcore, {OPERATORS[kind]}: {escape(names)}." for kind, names in listed.items()]
    if unknown:
        lines.append(f"**fvcore cannot count {escape(unknown)}, which may hold products.**")
    return " ".join([agreed, *lines])


def _memory(memory: Json) -> str:
    """Each load of both models: measured, and the closed form in brackets."""
    rows = [
        [f"{load}, {model}", *(f"{measured} ({formula})" for measured, formula in cells)]
        for load, model, cells in load_rows(memory)
    ]
    if not rows:
        return ""
    intro = f"Measured ({escape(memory['method'])}; {escape(memory['dtype'])}), in brackets by formula. {LIKE_FOR_LIKE}"
    head = ["load", "weights", "KV cache", "activations at peak", "all"]
    return "\n\n".join(["## Memory", intro, table(head, rows)])


def _speed(speed: Json | None) -> str:
    if speed is None:
        return ""
    rows = [[row.name, *map(_rates, row.spreads.values()), f"{row.ratio:.2f}x"] for row in speed_rows(speed)]
    where = f"{escape(speed['device'])}, {escape(speed['dtype'])}, CPU threads: {speed['threads']}"
    protocols = "; ".join(escape(run["protocol"]) for run in speed["runs"])
    intro = (
        f"Tokens per second of all sequences together, median (slowest to fastest); {protocols}; on {where}. "
        f"{LIKE_FOR_LIKE}"
    )
    return "\n\n".join(["## Speed", intro, table(["", "source", "MoM", "ratio"], rows)])


def _rates(spread: Json) -> str:
    return f"{rate(spread['median'])} ({rate_range(spread)})"


def _routing(routing: Json | None) -> str:
    if routing is None:
        return ""
    rows = [
        [f"{half['step']}, {KINDS[half['kind']]}", *_half_cells(half)]
        for half in routing["steps"]
        if half["choices"] > 1
    ]
    lines = [_pool_line(name, routing[kind]) for kind, name in KINDS.items()]
    lines += [_patch_line(name, routing["steps"], kind) for kind, name in KINDS.items()]
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
    rows = [[escape(name), escape(value)] for name, value in fact_rows(found)]
    sections = ["## Provenance", table(["", ""], rows)]
    if found["command"]:
        sections += ["Made by", fenced(found["command"])]
    if found["recipe"]:
        sections += ["Recipe", fenced(json.dumps(found["recipe"], indent=2, ensure_ascii=False), "json")]
    return "\n\n".join(sections)
