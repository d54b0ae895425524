"""Weight files of a checkpoint folder -> tensors; nothing in them is run and no path leaves the folder."""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from momify.errors import MomifyError

SINGLE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_weight_files(folder: Path) -> list[Path]:
    """The weight files of `folder`: model.safetensors or its shards, else pytorch_model.bin or its shards.

    Raises MomifyError where none lies there, a shard is missing, or a path leaves the folder.
    """
    for name in SINGLE:
        path = inside(folder, name)
        if path.is_file():
            return _shards(folder, path) if name.endswith(".index.json") else [path]
    raise MomifyError(f"no weights in {folder}; it needs one of {', '.join(SINGLE)}")


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that a shard index names, each once, sorted."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MomifyError(f"{index} has no weight_map; give a complete checkpoint")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise MomifyError(f"{index} names {name!r} as the file of {tensor}; give a complete checkpoint")
        names.add(name)
    paths = [inside(folder, name) for name in sorted(names)]
    for path in paths:
        if not path.is_file():
            raise MomifyError(f"shard {path} is missing, {index.name} names it; fetch the checkpoint again")
        if path.suffix != index.name.removesuffix(".index.json")[index.name.index(".") :]:
            raise MomifyError(f"shard {path} has another format than {index.name}; give a complete checkpoint")
    return paths


def inside(folder: Path, name: str) -> Path:
    """`folder / name`. Raises MomifyError where that leaves the folder (into a hub cache's blobs it may)."""
    windows = PureWindowsPath(name)
    leaves = PurePosixPath(name).is_absolute() or bool(windows.anchor) or ".." in windows.parts or "\0" in name
    path = folder / name
    if not leaves:
        root, target = folder.resolve(), path.resolve()
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        leaves = not (target.is_relative_to(root) or target.is_relative_to(blobs))
    if leaves:
        raise MomifyError(f"file {name!r} leads out of the model folder {folder}; put the file itself there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises MomifyError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MomifyError(f"{path} is not JSON ({_short(error)}); fetch the checkpoint again") from error
    except OSError as error:
        raise MomifyError(f"cannot read {path}: {_short(error)}; check the file and its permissions") from error
    if not isinstance(data, dict):
        raise MomifyError(f"{path} holds a JSON {type(data).__name__}, not an object; fetch the checkpoint again")
    return data


def read_tensors(folder: Path, files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of `files` under their names there. Raises MomifyError for damaged files, and for code."""
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        read = _read_safetensors if path.suffix == ".safetensors" else _read_bin
        _refuse_empty(path)
        for name, tensor in read(path).items():
            if name in tensors:
                raise MomifyError(f"tensor {name} lies in two shards of {folder}; fetch the checkpoint again")
            tensors[name] = tensor
    return tensors


def _refuse_empty(path: Path) -> None:
    """Raise MomifyError for an empty file and for what `git clone` leaves without git-lfs."""
    with open(path, "rb") as stream:
        start = stream.read(40)
    if not start:
        raise MomifyError(f"{path} is empty; fetch the checkpoint again")
    if start.startswith(b"version https://git-lfs"):
        raise MomifyError(f"{path} is a git-lfs pointer, not the weights; run git lfs pull in its folder")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise MomifyError(f"{path} is truncated or damaged ({_short(error)}); fetch it again") from error


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MomifyError(
            f"{path} is damaged or holds more than tensors; nothing in it was run, convert it to safetensors"
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise MomifyError(f"{path} is truncated or damaged ({_short(error)}); fetch it again") from error
    if not isinstance(data, dict):
        raise MomifyError(f"{path} holds a {type(data).__name__}, not a dictionary of tensors; convert it first")
    for name, tensor in data.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise MomifyError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor; save the weights alone")
    return {name: tensor.detach() for name, tensor in data.items()}


def _short(error: BaseException) -> str:
    """The first line of an error, at most 120 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
