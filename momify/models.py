"""MODEL as a user names it -> a folder -> a checked model; and writing a model folder whole."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from momify.convert.source import Source, open_source
from momify.errors import MomifyError
from momify.files import whole_folder, write_json
from momify.model import MomForCausalLM
from momify.runs import find_run, latest_run

BUILTIN = "builtin:demo"
PROVENANCE = "momify.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEXTS = ["config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
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
        if not (run.model / "config.json").is_file():
            raise MomifyError(f"run {run.folder} has no model yet; momify train {run.recipe_file} --resume makes it")
        return run.model
    if Path(name).exists():
        return Path(name)
    if not _HUB_NAME.fullmatch(name):
        raise MomifyError(f"model folder {name} does not exist; give a folder with config.json and weights")
    return _from_hub(name, revision, say)


def _from_hub(name: str, revision: str | None, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    for local in (True, False):
        if not local:
            say(f"asking the hub for {name}")
        for weights in _WEIGHTS:
            try:
                folder = Path(
                    snapshot_download(name, revision=revision, allow_patterns=_TEXTS + weights, local_files_only=local)
                )
            except Exception:  # each of the client's errors means the same: not to be had this way
                break
            if any(folder.glob(weights[0])):
                return folder
    raise MomifyError(
        f"model {name} is neither a folder, nor a run, nor to be had from the hub (no network, or no such name); "
        f"download it elsewhere and give its folder, or use {BUILTIN}"
    )


def model_type(folder: Path) -> str:
    """`gpt2` or `mom`, as config.json says. Raises MomifyError for anything else."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except FileNotFoundError:
        raise MomifyError(f"no config.json in {folder}; give a folder written by save_pretrained or momify") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise MomifyError(f"{folder}/config.json is not the config of a model; give another folder") from None
    if kind not in ("gpt2", "mom"):
        raise MomifyError(f"{folder}: model_type is {kind!r}; momify reads 'gpt2' and 'mom'")
    return kind


def load_model(folder: Path) -> PreTrainedModel:
    """The causal language model in `folder`, GPT-2 or MoM, in float32 and eval mode.

    Raises MomifyError for anything missing, extra, mis-shaped or not finite.
    """
    return load_dense(open_source(folder)) if model_type(folder) == "gpt2" else load_mom(folder)


def load_dense(source: Source) -> GPT2LMHeadModel:
    """transformers' own GPT-2 with the checked tensors of `source`, in float32."""
    source.config.tie_word_embeddings = source.tied
    model = GPT2LMHeadModel(source.config)
    state = {n if n.startswith("lm_head.") else f"transformer.{n}": t for n, t in source.tensors.items()}
    wrong = model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    assert not wrong.unexpected_keys, wrong  # open_source checked the names
    assert set(wrong.missing_keys) <= {"lm_head.weight"}, wrong  # the tied head
    return model.eval()


def load_mom(folder: Path, dtype: torch.dtype = torch.float32) -> MomForCausalLM:
    """The MoM in `folder`. Raises MomifyError for anything missing, extra, mis-shaped or not finite."""
    try:
        model, info = MomForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MomifyError(f"{folder} holds no MoM that can be read: {reason}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            name = sorted(map(str, info[what]))[0]
            raise MomifyError(
                f"{folder}: {what.replace('_', ' ')[:-5]} tensor {name}; the file is damaged, export it again"
            )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise MomifyError(
                f"{folder}: tensor {name} has values that are not finite; go back to an earlier checkpoint"
            )
    return model.eval()


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, provenance: dict[str, Any]
) -> None:
    """A model folder, whole or not at all: weights, config, tokenizer and momify.json (where it comes from)."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / PROVENANCE, provenance)


def read_provenance(folder: Path) -> dict[str, Any]:
    """momify.json of a model folder, empty where there is none."""
    path = Path(folder) / PROVENANCE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise MomifyError(f"{path} cannot be read ({error}); convert the source again") from None
