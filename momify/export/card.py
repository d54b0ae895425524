"""The model card (README.md) of an export: what it is, how to load it, what it costs, where it comes from."""

import json
import re
from pathlib import Path
from typing import Any

from momify.amounts import amount, size
from momify.convert.source import HUB_NAME
from momify.convert.stored_mom import model_class
from momify.export.written import Written
from momify.measure.cost import attention_steps, kv_bytes_per_token, parameters
from momify.model import MomConfig, MomForCausalLM
from momify.model.config import OLDEST
from momify.report.markdown import escape, fenced, table
from momify.report.words import apart, perplexity_text

Json = dict[str, Any]

_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)
inputs = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30)[0]))"""
_USE_GPT2 = _USE.replace(", trust_remote_code=True", "")
_USE_CLASSIFIER = _USE.replace("AutoModelForCausalLM", "AutoModelForSequenceClassification").replace(
    "tokenizer.decode(model.generate(**inputs, max_new_tokens=30)[0])", "model(**inputs).logits.softmax(-1)"
)


def model_card(config: Json, provenance: Json, report: Json | None = None) -> str:
    """README.md from config.json, momify.json and, where there is one, report.json."""
    source, classifies = _display(_recorded(provenance)), model_class(config) is not MomForCausalLM
    task = "text-classification" if classifies else "text-generation"
    sections = [
        _front_matter(_recorded(provenance), "momify, mixture-of-modules, gpt2", task),
        f"# {escape(source or 'A GPT-2')} as a Mixture of Modules",
        "A GPT-2 taken apart into a pool of attention and feed-forward modules; a router picks a module, or SKIP, "
        "for each token at each step ([Mixture-of-Modules](https://arxiv.org/abs/2407.06677)). Made by momify.",
        _numbers(report),
        "## Use",
        f"The model's code lies in this folder and needs torch and transformers {OLDEST} or newer, nothing else; "
        "`trust_remote_code=True` lets it run. Read it first if you do not know where the folder comes from.",
        fenced(_USE_CLASSIFIER if classifies else _USE, "python"),
        "## Shape",
        _shape(MomConfig.from_dict(config)),
        _origin(source, provenance),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def gpt2_card(written: Written, provenance: Json, report: Json | None = None) -> str:
    """README.md of a MoM written as a plain GPT-2; of report.json it takes the quality, which stays the same."""
    source = _display(_recorded(provenance))
    sections = [
        _front_matter(_recorded(provenance), "momify, gpt2"),
        f"# {escape(source or 'A GPT-2')}, made smaller, as a plain GPT-2",
        "A GPT-2 taken apart into attention and feed-forward modules, of which some were removed "
        "([Mixture-of-Modules](https://arxiv.org/abs/2407.06677)), and written as a GPT-2 again, which any GPT-2 tool "
        "loads. Made by momify.",
        _quality(report),
        "## Use",
        fenced(_USE_GPT2, "python"),
        "## Cost",
        table(written.head(), written.rows()),
        "\n".join(f"- {line}" for line in written.lines()),
        _origin(source, provenance),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _recorded(provenance: Json) -> str | None:
    """The source as the conversion recorded it: a hub name, or a folder on some machine."""
    source = provenance.get("source")
    name = source.get("model") if isinstance(source, dict) else None
    return name if isinstance(name, str) and name.strip() else None


def _display(name: str | None) -> str | None:
    """A source's name without the folders of the machine that converted it."""
    return name if name is None or HUB_NAME.fullmatch(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def _front_matter(name: str | None, tags: str, task: str = "text-generation") -> str:
    """What the hub reads; JSON strings are YAML strings, so nothing in a name can break out of its line."""
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    lines.append(f"tags: [{tags}]")
    if name and HUB_NAME.fullmatch(name) and not Path(name).exists():  # a folder is no base model
        lines.append(f"base_model: {json.dumps(name)}")
    return "\n".join([*lines, "---"])


def _numbers(report: Json | None) -> str:
    if report is None:
        return ""
    found = report["perplexity"]
    told = apart(found.get("mom_trained") or found.get("mom_start") or {})
    return f"**{escape(report['verdict'])}.** Perplexity: {escape(found['protocol'])}.{told}"


def _quality(report: Json | None) -> str:
    """Perplexity alone: what else a report has is the MoM's, and is not true of the GPT-2."""
    if report is None:
        return ""
    found = report["perplexity"]
    before, after = found["source"], found["mom_trained"] or found["mom_start"]
    change = f"{perplexity_text(before)} -> {perplexity_text(after)}"
    return f"**Perplexity {escape(change)}**: {escape(found['protocol'])}.{apart(after or {})}"


def _shape(config: MomConfig) -> str:
    rows = [
        ["attention modules", str(config.num_mha_modules)],
        ["feed-forward modules", str(config.num_ffn_modules)],
        ["steps", f"{config.num_steps}, attention in {attention_steps(config)} of them"],
        ["modules per token and step", str(config.modules_per_token)],
        [
            "width, inner width, heads",
            f"{config.hidden_size}, {config.intermediate_size}, {config.num_attention_heads}",
        ],
        ["vocabulary, positions", f"{config.vocab_size}, {config.n_positions}"],
        ["parameters", amount(parameters(config).total)],
        ["KV cache per token, 16 bit", size(kv_bytes_per_token(config))],
    ]
    return table(["", ""], rows)


def _origin(source: str | None, provenance: Json) -> str:
    """Where it comes from; the whole record is in momify.json beside the card."""
    lines = ["## Origin"]
    found = provenance.get("source")
    digest = found.get("sha256") if isinstance(found, dict) else None
    lines.append(f"Source: {escape(source or 'unknown')}" + (f", SHA-256 {escape(digest)}." if digest else "."))
    trained = provenance.get("trained")
    if isinstance(trained, dict):
        steps, tokens = escape(trained.get("steps")), escape(trained.get("tokens"))
        lines.append(f"Trained after conversion: {steps} steps, {tokens} tokens.")
    lines.append("Recipe, versions and settings: `momify.json`.")
    return "\n\n".join(lines)
