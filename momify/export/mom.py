"""Export as `mom`: a folder that transformers loads by itself, the model's code lying beside its weights.

Its users need torch and transformers and pass trust_remote_code=True; they do not need momify.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from momify import model as model_package
from momify.convert.stored_mom import read_mom_config
from momify.convert.weight_files import find_weight_files, read_json
from momify.errors import MomifyError
from momify.export.card import model_card
from momify.export.folder import PROVENANCE, TEXTS, check_target, companions, provenance
from momify.files import whole_folder, write_json, write_text
from momify.model import MomForCausalLM, MomForSequenceClassification, half_steps
from momify.model.config import OLDEST

AUTO_MAP = {
    "AutoConfig": "config.MomConfig",
    "AutoModelForCausalLM": "modeling.MomForCausalLM",
    "AutoModelForSequenceClassification": "classification.MomForSequenceClassification",
}
COMPANIONS = (*TEXTS, "model.safetensors.index.json")
Json = dict[str, Any]


def export_mom(
    model_folder: Path, target: Path, report: Json | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the MoM in `model_folder` to `target`, whole or not at all, and return `target`.

    It holds weights, config with auto_map, the model's code, tokenizer, a model card (with the numbers of `report`,
    a report.json, if given) and momify.json. `say` gets what loads it, a line at a time. Raises MomifyError for a
    folder that is no complete MoM, and for a `target` that holds something else than an earlier export.
    """
    model_folder, target = Path(model_folder), Path(target)
    config = _read_config(model_folder)
    weights = _checked_weights(model_folder, config)
    check_target(model_folder, target)
    record = provenance(model_folder, "mom")
    with whole_folder(target) as folder:
        for path in [*weights, *companions(model_folder, COMPANIONS), *code_files()]:
            shutil.copyfile(path, folder / path.name)
        write_json(folder / "config.json", {**config, "auto_map": AUTO_MAP})
        write_json(folder / PROVENANCE, record)
        write_text(folder / "README.md", model_card(config, record, report))
    say(f"loads where torch and transformers {OLDEST} or newer are, with trust_remote_code=True")
    if not any(half.routed for half in half_steps(read_mom_config(model_folder))):
        say("none of its steps chooses: --format gpt2 writes a plain GPT-2, which any GPT-2 tool loads")
    return target


def code_files() -> list[Path]:
    """The files that a MoM's code consists of, all in one flat folder."""
    folder = Path(model_package.__file__).parent
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def _read_config(folder: Path) -> Json:
    """config.json of a MoM, as it stands. Raises MomifyError for any other."""
    if not folder.is_dir():
        raise MomifyError(f"model folder {folder} does not exist; give a folder that momify convert or train wrote")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "mom":
        kind = config.get("model_type")
        raise MomifyError(f"{folder} holds a model of type {kind!r}, not 'mom'; convert it first")
    return config


def _checked_weights(folder: Path, config: Json) -> list[Path]:
    """The weight files, after a look at their headers: each tensor of the model there, in its shape, and no other."""
    files = find_weight_files(folder)
    if any(path.suffix != ".safetensors" for path in files):
        raise MomifyError(f"{folder} has no safetensors file; save the model anew with save_pretrained")
    found: dict[str, list[int]] = {}
    for path in files:
        found |= _header(path)
    expected, tied = _expected(folder, config)
    for name, shape in expected.items():
        if name not in found and name not in tied:
            raise MomifyError(f"{folder} lacks tensor {name}; save or convert the model again")
        if found.get(name, shape) != shape:
            raise MomifyError(f"{folder}: tensor {name} has shape {found[name]}, not {shape}; convert it again")
    if extra := sorted(found.keys() - expected.keys()):
        raise MomifyError(f"{folder} has a tensor {extra[0]} that the model does not know; convert it again")
    return files


def _header(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a file; it is checked for its size, its data is not read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise MomifyError(f"{path} is truncated or damaged ({error}); convert or train it again") from error


def _expected(folder: Path, config: Json) -> tuple[dict[str, list[int]], set[str]]:
    """Names and shapes of what the model's class saves, and which names may be missing as they are tied."""
    classifier = "MomForSequenceClassification" in (config.get("architectures") or [])
    build, known = MomForSequenceClassification if classifier else MomForCausalLM, read_mom_config(folder)
    if classifier and isinstance(config.get("id2label"), dict):
        known.num_labels = len(config["id2label"])
    try:
        with torch.device("meta"):
            model = build(known)
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MomifyError(f"{folder}/config.json describes no MoM that can be built: {reason}") from error
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, set(model.all_tied_weights_keys)
