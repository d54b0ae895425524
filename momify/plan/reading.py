"""The sizes of a source from its config.json alone: no weights, no torch, no network where it can be helped."""

import json
from pathlib import Path
from typing import Any

from momify.errors import MomifyError
from momify.measure.cost import Pool, Shape
from momify.recipe_blocks import Scratch
from momify.runs import find_run

BUILTIN = "builtin:demo"
PUBLISHED = {  # layers, width: config.json of the four on the hub, which do not change
    "gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600),
}  # fmt: skip
_WHOLE = ("n_layer", "n_embd", "vocab_size", "n_positions")


def read_shape(name: str, revision: str | None = None) -> Shape:
    """The shape of the dense model that MODEL means: a folder, a run, builtin:demo, or a hub name.

    The sizes of the published GPT-2s are known here; for another hub name the local cache is asked, then the network,
    for config.json only. Raises MomifyError with the remedy.
    """
    known = PUBLISHED.get(name.removeprefix("openai-community/"))
    if known and not Path(name).exists() and revision is None and find_run(name) is None:
        layers, width = known
        return dense_shape({"n_layer": layers, "n_embd": width}, name)
    path = _config_file(name, revision)
    return dense_shape(_read(path), str(path))


def scratch_shape(scratch: Scratch) -> Shape:
    """The shape of the dense model that a recipe trains from random weights; its tokenizer may have fewer entries."""
    sizes = {"n_layer": scratch.layers, "n_embd": scratch.width, "n_positions": scratch.context}
    return dense_shape({**sizes, "vocab_size": scratch.vocabulary}, "source.scratch")


def dense_shape(config: dict[str, Any], name: str) -> Shape:
    """The shape of a GPT-2 from the content of its config.json, with transformers' defaults for what it leaves out.

    Raises MomifyError, which `name` opens, for another kind of model and for sizes that cannot be.
    """
    kind = config.get("model_type", "gpt2")
    if kind != "gpt2":
        remedy = "name the model it was made from" if kind == "mom" else "give a GPT-2"
        raise MomifyError(f"{name}: model_type is {kind!r}; momify plan starts from a gpt2 source, {remedy}")
    sizes = {"n_layer": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024} | config
    for key in (*_WHOLE, *(["n_inner"] if config.get("n_inner") else [])):
        if not isinstance(sizes[key], int) or isinstance(sizes[key], bool) or sizes[key] < 1:
            raise MomifyError(f"{name}: {key} is {sizes[key]!r:.60}; it must be a whole number of at least 1")
    sizes["n_inner"] = config.get("n_inner") or 4 * sizes["n_embd"]
    pool = Pool.fixed(sizes["n_layer"])
    return Shape(
        width=sizes["n_embd"],
        inner=sizes["n_inner"],
        vocab=sizes["vocab_size"],
        positions=sizes["n_positions"],
        tied=bool(config.get("tie_word_embeddings", True)),
        layer_norms=2 * sizes["n_layer"] + 1,
        picks=1,
        router_hidden=0,
        mha=pool,
        ffn=pool,
        activation=str(config.get("activation_function", "gelu_new")),
    )


def _config_file(name: str, revision: str | None) -> Path:
    """Where the config.json of MODEL lies. Raises MomifyError where there is none."""
    if name == BUILTIN:
        folder = Path(__file__).parents[1] / "demo" / "checkpoint"
    elif run := find_run(name):
        folder = run.source if (run.source / "config.json").is_file() else run.model
    elif Path(name).exists() or name.startswith((".", "/", "~")):
        folder = Path(name)
    else:
        return _from_hub(name, revision)
    if not (folder / "config.json").is_file():
        raise MomifyError(f"no config.json in {folder}; give a folder written by save_pretrained or the hub")
    return folder / "config.json"


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries, line by line; what comes of them is told below
    for local in (True, False):
        try:
            return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=local))
        except Exception:  # each of the client's errors means the same: not to be had this way
            continue
    raise MomifyError(
        f"model {name} is neither a folder, nor a run, nor to be had from the hub (no network, or no such name); "
        f"give a folder with its config.json, one of {', '.join(PUBLISHED)}, or {BUILTIN}"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MomifyError(f"{path} cannot be read: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(config, dict):
        raise MomifyError(f"{path} holds a {type(config).__name__}, not the config of a model; give another folder")
    return config
