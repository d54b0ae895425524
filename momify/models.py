"""MODEL as a user names it -> a folder -> a checked model; and writing a model folder whole."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from momify.convert.source import HUB_NAME, Source, is_finite, open_source
from momify.convert.stored_mom import open_mom
from momify.convert.weight_files import find_weight_files, inside, read_json, shown
from momify.errors import MomifyError
from momify.files import whole_folder, write_json
from momify.model import MomForCausalLM
from momify.model.activation import make_activation
from momify.runs import Run, find_run, latest_run

BUILTIN = "builtin:demo"
PROVENANCE = "momify.json"
GENERATION = "generation_config.json"
_DRAWING = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty", "early_stopping", "max_length",
    "max_new_tokens", "min_length", "min_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "renormalize_logits", "num_return_sequences",
)  # fmt: skip
_TEXTS = ["config.json", GENERATION, "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
_WEIGHTS = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)


def locate(name: str | None, revision: str | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder that MODEL means: builtin:demo, a folder, a run's name, the latest run (None), else a hub name.

    The network is asked for hub names only, after the local cache. Raises MomifyError with the remedy.
    """
    if name == BUILTIN:
        return Path(__file__).parent / "demo" / "checkpoint"
    run = latest_run(name) if name is None else find_run(name)
    if run is not None:
        return _model_of(run)
    if Path(name).exists():
        return Path(name)
    if not HUB_NAME.fullmatch(name):
        raise MomifyError(
            f"model folder {name} does not exist; give a folder with config.json and weights (one that does not begin "
            "with / is looked for from the folder that momify is started in)"
        )
    return _from_hub(name, revision, say)


def _model_of(run: Run) -> Path:
    """The MoM of a run, or the dense model where the run is phase 1 alone."""
    folder = run.source if run.recipe.mom is None else run.model
    if not (folder / "config.json").is_file():
        raise MomifyError(f"run {run.folder} has no model yet; momify train {run.recipe_file} --resume makes it")
    return folder


def _from_hub(name: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """What the cache holds of a hub name if it is all there, else what the hub gives, else what the cache holds."""
    kept = _snapshot(name, revision, local=True)
    if kept is not None and _is_complete(kept):
        return kept
    say(f"asking the hub for {name}")
    found = _snapshot(name, revision, local=False) or kept
    if found is None:
        raise MomifyError(
            f"model {name} is neither a folder, nor a run, nor to be had from the hub (no network, or no such name); "
            f"download it elsewhere and give its folder, or use {BUILTIN}"
        )
    return found


def _snapshot(name: str, revision: str | None, local: bool) -> Path | None:
    """The folder with weights that a hub name stands for, from the cache alone if `local`; None: not to be had."""
    from huggingface_hub import snapshot_download

    for weights in _WEIGHTS:
        try:
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=_TEXTS + weights, local_files_only=local)
            )
        except Exception:  # each of the client's errors means the same: not to be had this way
            return None
        if any(folder.glob(weights[0])):
            return folder
    return None


def _is_complete(folder: Path) -> bool:
    """Whether config, all weights and a tokenizer lie in a snapshot: a download that broke off leaves a part."""
    has = {name: (folder / name).is_file() for name in ("config.json", "tokenizer.json", "vocab.json", "merges.txt")}
    try:
        find_weight_files(folder)
    except MomifyError:
        return False
    return has["config.json"] and (has["tokenizer.json"] or (has["vocab.json"] and has["merges.txt"]))


def model_type(folder: Path) -> str:
    """`gpt2` or `mom`, as config.json says. Raises MomifyError for anything else."""
    path = inside(Path(folder), "config.json")
    if not path.is_file():
        raise MomifyError(f"no config.json in {folder}; give a folder written by save_pretrained or momify")
    kind = read_json(path).get("model_type")
    if kind not in ("gpt2", "mom"):
        raise MomifyError(f"{folder}: model_type is {kind!r:.80}; momify reads 'gpt2' and 'mom'")
    return kind


def load_model(folder: Path) -> PreTrainedModel:
    """The causal language model in `folder`, GPT-2 or MoM, in float32 and eval mode.

    Raises MomifyError for anything missing, extra, mis-shaped or not finite.
    """
    return load_dense(open_source(folder)) if model_type(folder) == "gpt2" else load_mom(folder)


def load_dense(source: Source) -> GPT2LMHeadModel:
    """transformers' own GPT-2 with the checked tensors of `source`, in float32."""
    source.config.tie_word_embeddings = source.tied
    with no_init_weights():
        model = GPT2LMHeadModel(source.config)
    model.tie_weights()
    _fill(model, {n if n.startswith("lm_head.") else f"transformer.{n}": n for n in source.tensors}, source.tensors)
    return model.eval()


def load_teacher(source: Source) -> GPT2LMHeadModel:
    """The source to learn from: as `load_dense`, its GELU one operator instead of six (equal but for last bits)."""
    model = load_dense(source)
    fused = make_activation(source.config.activation_function)
    if fused.kernel == "gelu_tanh":
        for block in model.transformer.h:
            block.mlp.act = torch.nn.GELU(approximate="tanh")
    return model


def load_mom(folder: Path) -> MomForCausalLM:
    """The MoM in `folder`, float32. Raises MomifyError for anything missing, extra, mis-shaped or not finite."""
    stored = open_mom(folder)
    with no_init_weights():
        model = MomForCausalLM(stored.config)
    model.tie_weights()
    for name in _fill(model, {name: name for name in stored.tensors}, stored.tensors):
        raise MomifyError(f"{folder}: tensor {name} has values that are not finite; go back to an earlier checkpoint")
    return model.eval()


@torch.no_grad()
def _fill(model: PreTrainedModel, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Copy tensors into a model, one at a time, so that it is in memory once; the names of those not finite."""
    parameters, broken = model.state_dict(), []
    for name, stored in names.items():
        tensor = tensors[stored]
        parameters[name].copy_(tensor)
        if not is_finite(tensor):
            broken.append(name)
    return broken


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    provenance: dict[str, Any],
    generation: Mapping[str, Any] | None = None,
) -> None:
    """A model folder, whole or not at all: weights, config, tokenizer and momify.json (where it comes from).

    generation: as `generation_settings` gives; None: those of the model that lay there.
    """
    kept = generation_settings(folder) if generation is None else generation
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        _add_generation(temporary / GENERATION, kept)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / PROVENANCE, provenance)


def generation_settings(folder: Path) -> dict[str, Any]:
    """How the model in `folder` wants its tokens drawn: of generation_config.json what its config.json does not say.

    Raises MomifyError for a file that is not JSON.
    """
    path = inside(Path(folder), GENERATION)
    found = read_json(path) if path.is_file() else {}
    return {name: found[name] for name in _DRAWING if found.get(name) is not None}


def _add_generation(path: Path, settings: Mapping[str, Any]) -> None:
    """Write `settings` into the generation_config.json that transformers made of a config."""
    if settings:
        made = {name: value for name, value in read_json(path).items() if name != "_from_model_config"}
        write_json(path, {**made, **settings})


def step_layers(provenance: Mapping[str, Any]) -> list[int | None] | None:
    """The source layer that each step of a converted model stands for, None for an added one.

    None where none stands for any: routers that start at random, and models without a plan. Raises MomifyError for
    what momify did not write.
    """
    plan = provenance.get("plan", {})
    layers = None if plan.get("init") == "random" else plan.get("step_layers")
    known = [layer for layer in layers if layer is not None] if isinstance(layers, list) else []
    if layers is not None and not (known and all(type(layer) is int for layer in known)):
        raise MomifyError(f"{PROVENANCE}: plan.step_layers is {layers!r:.80}; convert the source again")
    return layers


def open_own_source(folder: Path, model: Path) -> Source:
    """The source in `folder` that the MoM in `model` was made from.

    Raises MomifyError for another one, known by its SHA-256; a MoM that says nothing of it may have any.
    """
    source = open_source(folder)
    check_own_source(folder, source.sha256, model)
    return source


def check_own_source(folder: Path, sha256: str, model: Path) -> None:
    """Raise MomifyError where weights of that hash, in `folder`, are not what the MoM in `model` was made from."""
    made_from = read_provenance(model).get("source", {}).get("sha256")
    if made_from not in (None, sha256):
        raise MomifyError(
            f"{folder} is not the source that {model} was made from: its SHA-256 differs; convert it anew, "
            "or put back the model that was converted (momify eval --no-baseline scores the MoM alone)"
        )


def read_provenance(folder: Path) -> dict[str, Any]:
    """momify.json of a model folder, empty where there is none. Raises MomifyError for what momify did not write."""
    path = inside(Path(folder), PROVENANCE)
    if not path.exists():
        return {}
    found = read_json(path)
    parts = {"source": dict, "recipe": dict, "versions": dict, "plan": dict, "trained": dict}
    for name, kind in parts.items():
        if name in found and not isinstance(found[name], kind):
            raise MomifyError(f"{path}: {name} is a {type(found[name]).__name__}; convert the source again")
    for name, value in found.get("trained", {}).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise MomifyError(f"{path}: trained.{shown(name)} is {value!r:.80}, not a number; convert the source again")
    return found
