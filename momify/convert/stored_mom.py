"""Opens a saved MoM: its config and the description of its tensors, checked against each other before data is read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from momify.convert.source import FLOAT_TYPES, LARGEST_SIZE, is_finite
from momify.convert.weight_files import StoredTensors, find_weight_files, inside, read_json, read_tensors, shown
from momify.errors import MomifyError
from momify.model import MomConfig, MomForCausalLM, MomForSequenceClassification, MomPreTrainedModel

HEAD, EMBEDDING = "lm_head.weight", "model.wte.weight"
_LARGEST = {"num_steps": 1 << 16, "num_mha_modules": 1 << 16, "num_ffn_modules": 1 << 16}  # else LARGEST_SIZE
_LARGEST_TABLE = 1 << 22  # steps x choices: such a table is built before any tensor could contradict the config


@dataclass(frozen=True)
class StoredMom:
    """A checked MoM: its config, and its tensors as they lie in their files."""

    config: MomConfig
    tensors: StoredTensors
    folder: Path


def open_mom(folder: Path, build: type[MomPreTrainedModel] = MomForCausalLM) -> StoredMom:
    """The MoM in `folder`, of the class `build`; only headers are read.

    Raises MomifyError for anything that is missing, extra or mis-shaped, and for a path that leaves the folder.
    """
    folder = Path(folder)
    config = read_mom_config(folder)
    files = find_weight_files(folder)
    if any(path.suffix != ".safetensors" for path in files):
        raise MomifyError(f"{folder} has no safetensors file; save the model anew with save_pretrained")
    tensors = read_tensors(folder, files)
    _check_descriptions(folder, tensors, expected_shapes(folder, config, build), config.tie_word_embeddings)
    if config.tie_word_embeddings:
        tensors = StoredTensors({name: stored for name, stored in tensors.stored.items() if name != HEAD})
    return StoredMom(config, tensors, folder)


def read_mom_config(folder: Path) -> MomConfig:
    """The MomConfig in `folder`'s config.json. Raises MomifyError for other models and impossible values."""
    path = inside(folder, "config.json")
    if not path.is_file():
        raise MomifyError(f"no config.json in {folder}; give a folder that momify wrote")
    data = read_json(path)
    if data.get("model_type") != "mom":
        raise MomifyError(f"{path}: model_type is {data.get('model_type')!r:.80}, not 'mom'; convert it first")
    _check_sizes(path, data)
    known = {*MomConfig.__annotations__, *MomConfig.attribute_map, "id2label", "num_labels"} & data.keys()
    with impossible_config(path):
        return MomConfig(**{name: data[name] for name in sorted(known)})


@contextmanager
def impossible_config(path: Path) -> Iterator[None]:
    """Turn what transformers raises for the values of a config into a MomifyError that names the file."""
    try:
        yield
    except (
        ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError, StrictDataclassError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise MomifyError(f"{path} describes no MoM that can be built: {reason}") from error


def model_class(config: Mapping[str, Any]) -> type[MomPreTrainedModel]:
    """The class of the model that config.json describes: a classifier of sequences, else a language model."""
    names = config.get("architectures")
    classifies = isinstance(names, list) and MomForSequenceClassification.__name__ in names
    return MomForSequenceClassification if classifies else MomForCausalLM


def _check_sizes(path: Path, data: Mapping[str, Any]) -> None:
    """Raise MomifyError for numbers beyond any model, before something is made of that size."""
    for name, value in data.items():
        largest = _LARGEST.get(name, LARGEST_SIZE)
        if isinstance(value, int) and abs(value) > largest:
            raise MomifyError(f"{path}: {shown(name)} is {value!r:.20}, larger than any model's; correct that value")
    steps = data.get("num_steps", 0)
    for name in ("num_mha_modules", "num_ffn_modules"):
        modules = data.get(name, 0)
        if isinstance(steps, int) and isinstance(modules, int) and steps * (modules + 1) > _LARGEST_TABLE:
            raise MomifyError(f"{path}: {name} {modules} for {steps} steps is larger than any model's; correct one")


def expected_shapes(
    folder: Path, config: MomConfig, build: type[MomPreTrainedModel] = MomForCausalLM
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a MoM of this config and class, without making them."""
    with impossible_config(folder / "config.json"), torch.device("meta"):
        model = build(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_descriptions(
    folder: Path, tensors: StoredTensors, shapes: Mapping[str, tuple[int, ...]], tied: bool
) -> None:
    for name, shape in shapes.items():
        stored = tensors.stored.get(name)
        if stored is None and tied and name == HEAD:
            continue
        if stored is None:
            raise MomifyError(f"{folder} lacks tensor {name}; save or convert the model again")
        if stored.shape != shape:
            raise MomifyError(f"{folder}: tensor {name} has shape {stored.shape}, not {shape}; convert it again")
        if stored.dtype not in FLOAT_TYPES:
            raise MomifyError(f"{folder}: tensor {name} is {stored.dtype}; weights must be floating point")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise MomifyError(f"{folder} has a tensor {shown(extra[0])} that the model does not know; convert it again")
    if tied and HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise MomifyError(f"{folder}: {HEAD} differs from the embedding it is tied to; convert it again")


def check_finite(stored: StoredMom) -> None:
    """Raise MomifyError where a tensor holds what is no number; all of them are read."""
    for name, tensor in stored.tensors.items():
        if not is_finite(tensor):
            raise MomifyError(
                f"{stored.folder}: tensor {name} has values that are not finite; go back to an earlier checkpoint"
            )
