"""Reads a GPT-2 checkpoint from a folder; refuses, by name, whatever is not one; executes nothing from it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GPT2Config
from transformers.activations import ACT2CLS

from momify.convert.weight_files import Stored, StoredTensors, find_weight_files, inside, read_json, read_tensors, shown
from momify.errors import MomifyError
from momify.files import sha256_of_files
from momify.model.config import LEARNED_ACTIVATIONS

LARGEST_SIZE = 1 << 28  # larger than any model's
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask that old checkpoints carry along


@dataclass(frozen=True)
class Source:
    """A checked GPT-2 checkpoint: its tensors as stored, under their names without "transformer.".

    A tensor is read from its file each time it is asked for.
    """

    config: GPT2Config
    tensors: StoredTensors  # lm_head.weight is among them only when the head is its own
    tied: bool
    dtype: torch.dtype  # the widest of the file
    sha256: str  # of config.json and the weight files
    folder: Path
    name: str


def open_source(folder: Path) -> Source:
    """Read the GPT-2 checkpoint in `folder` (safetensors first, else .bin), single or sharded.

    Raises MomifyError for everything that is not a complete, finite, plain GPT-2 (design section 9).
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise MomifyError(f"model folder {folder} {kind}; give a folder with config.json and weights")
    config = read_config(folder)
    files = find_weight_files(folder)
    tensors = canonical_names(read_tensors(folder, files))
    if config.n_layer > len(tensors):
        raise MomifyError(
            f"{folder} has {len(tensors)} tensors, too few for n_layer {config.n_layer}; correct config.json"
        )
    tied = _is_tied(tensors, config)
    if tied:
        tensors = StoredTensors({n: stored for n, stored in tensors.stored.items() if n != "lm_head.weight"})
    check_tensors(tensors, expected_shapes(config, tied))
    config.tie_word_embeddings = tied  # what the weights say, for everything that counts parameters
    return Source(
        config=config,
        tensors=tensors,
        tied=tied,
        dtype=_widest(tensors),
        sha256=sha256_of_files(sorted([folder / "config.json", *files])),
        folder=folder,
        name=source_name(folder),
    )


def read_config(folder: Path) -> GPT2Config:
    """The GPT2Config in `folder`'s config.json. Raises MomifyError for other models and impossible values."""
    path = inside(folder, "config.json")
    if not path.is_file():
        raise MomifyError(f"no config.json in {folder}; give a folder written by save_pretrained or the hub")
    data = read_json(path)
    _refuse_other_models(path, data)
    known = {
        *GPT2Config.__annotations__,
        *GPT2Config.attribute_map,
    }  # nothing beyond GPT-2's own can change logits
    try:
        config = GPT2Config(**{name: data[name] for name in sorted(known & set(data))})
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MomifyError(f"{path}: not a GPT-2 config ({reason[:160]}); correct that value") from error
    _check_values(path, config)
    return config


def _refuse_other_models(path: Path, data: Mapping[str, Any]) -> None:
    """Raise MomifyError where `data` describes something else than a plain GPT-2."""
    kind = data.get("model_type")
    if kind != "gpt2":
        raise MomifyError(f"{path}: model_type is {kind!r}; momify converts model_type 'gpt2' only")
    if data.get("add_cross_attention"):
        raise MomifyError(f"{path}: add_cross_attention is true; momify converts GPT-2 without cross-attention only")
    if data.get("quantization_config"):
        raise MomifyError(f"{path}: quantization_config is set; give the checkpoint from before quantization")
    if data.get("pruned_heads"):
        raise MomifyError(f"{path}: pruned_heads is {data['pruned_heads']!r}; give a checkpoint with all heads")


def _check_values(path: Path, config: GPT2Config) -> None:
    """Raise MomifyError for a value that no GPT-2 can have."""
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        value = getattr(config, name)
        if value is not None and not 1 <= value <= LARGEST_SIZE:
            raise MomifyError(f"{path}: {name} is {value!r:.20}; it must be 1 to {LARGEST_SIZE:,}")
    if config.n_embd % config.n_head:
        raise MomifyError(f"{path}: n_embd {config.n_embd} does not divide by n_head {config.n_head}; correct one")
    if config.activation_function not in ACT2CLS or config.activation_function in LEARNED_ACTIVATIONS:
        raise MomifyError(
            f"{path}: activation_function {config.activation_function!r} is unknown or has own parameters; "
            "use one such as gelu_new, gelu, relu, silu, tanh"
        )
    epsilon = config.layer_norm_epsilon
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise MomifyError(f"{path}: layer_norm_epsilon is {epsilon}; it must be a number above 0, such as 1e-5")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if not 0 <= getattr(config, name) < 1:
            raise MomifyError(f"{path}: {name} is {getattr(config, name)}; a dropout lies in [0, 1)")


def canonical_names(tensors: StoredTensors) -> StoredTensors:
    """`tensors` without the prefix "transformer." and without the mask buffers of old checkpoints.

    Raises MomifyError where two names mean the same tensor.
    """
    renamed: dict[str, Stored] = {}
    for name, stored in tensors.stored.items():
        short = name.removeprefix("transformer.")
        if BUFFERS.fullmatch(short):
            continue
        if short in renamed:
            raise MomifyError(f"tensor {shown(short)} is there twice, with and without 'transformer.'; remove one")
        renamed[short] = stored
    return StoredTensors(renamed)


def _is_tied(tensors: StoredTensors, config: GPT2Config) -> bool:
    """Whether the head is the embedding: it is not there, or a copy.

    A head that differs beside tie_word_embeddings true stays untied, as in transformers.
    """
    if not config.tie_word_embeddings:
        return False
    head, embedding = tensors.stored.get("lm_head.weight"), tensors.stored.get("wte.weight")
    if head is None:
        return True
    if embedding is None or (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    return head.strided and embedding.strided and torch.equal(head.read(), embedding.read())


def expected_shapes(config: GPT2Config, tied: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a GPT-2 of this config consists of; no head when `tied`."""
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.n_positions, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    if not tied:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    matrices = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner),
        "mlp.c_proj": (inner, width),
    }
    for layer in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            shapes[f"h.{layer}.{norm}.weight"] = shapes[f"h.{layer}.{norm}.bias"] = (width,)
        for name, (rows, columns) in matrices.items():
            shapes[f"h.{layer}.{name}.weight"] = (rows, columns)
            shapes[f"h.{layer}.{name}.bias"] = (columns,)
    return shapes


def check_tensors(tensors: StoredTensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise MomifyError unless `tensors` are exactly those of `shapes`, floating point and finite.

    Descriptions come first: no data is read before all of them fit.
    """
    _refuse_names("misses", [name for name in shapes if name not in tensors], "give a complete checkpoint")
    extra = [name for name in tensors if name not in shapes]
    _refuse_names("has unexpected", extra, "give a plain GPT-2 language model whose config.json fits")
    for name, shape in shapes.items():
        stored = tensors.stored[name]
        if stored.shape != shape:
            raise MomifyError(f"tensor {name} has shape {stored.shape}, config.json asks for {shape}; correct one")
        if stored.dtype not in FLOAT_TYPES or not stored.strided:
            kind = _kind(stored)
            raise MomifyError(f"tensor {name} is {kind}; weights must be float16, bfloat16 or float32, unquantized")
    for name in shapes:
        if not is_finite(tensors[name]):
            raise MomifyError(
                f"tensor {name} holds NaN, infinity or numbers beyond float32; the checkpoint is damaged, give another"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers, also in float32, in which momify computes."""
    return all(bound.float().isfinite() for bound in torch.aminmax(tensor))


def _kind(stored: Stored) -> str:
    name = str(stored.dtype).replace("torch.", "")
    return name if stored.strided else f"{name}, {stored.read().layout}".replace("torch.", "")


def _refuse_names(verb: str, names: list[str], remedy: str) -> None:
    """Raise MomifyError naming the first few of `names`, if there are any."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise MomifyError(f"the checkpoint {verb} tensors {', '.join(map(shown, names[:3]))}{more}; {remedy}")


def _widest(tensors: StoredTensors) -> torch.dtype:
    """The type that holds every tensor of the file without loss."""
    return reduce(torch.promote_types, (stored.dtype for stored in tensors.stored.values()))


def source_name(folder: Path) -> str:
    """A readable name: "org/name" for a folder in the hub's cache, else the folder's own name."""
    resolved = folder.resolve()
    cached = re.fullmatch(r"models--(.+)", resolved.parent.parent.name)
    if cached and resolved.parent.name == "snapshots":
        return cached.group(1).replace("--", "/")
    return resolved.name
