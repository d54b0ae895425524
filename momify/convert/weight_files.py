"""Weight files of a checkpoint folder -> tensors; nothing in them is run and no path leaves the folder."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from momify.errors import MomifyError
from momify.files import inside

SINGLE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_LARGEST_JSON = 32 << 20  # bytes; the index of a model of 100,000 tensors is smaller
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip


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
            raise MomifyError(f"{index} names {name!r:.80} as the file of {shown(tensor)}; give a complete checkpoint")
        names.add(name)
    paths = [inside(folder, name) for name in sorted(names)]
    for path in paths:
        if not path.is_file():
            raise MomifyError(f"shard {shown(path.name)} is missing, {index.name} names it; fetch {folder} again")
        if path.suffix != index.name.removesuffix(".index.json")[index.name.index(".") :]:
            raise MomifyError(f"shard {shown(path.name)} is of another kind than {index.name}; fetch {folder} again")
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises MomifyError for anything else, and for a file of absurd size."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise MomifyError(f"{path} has {path.stat().st_size:,} bytes, too many for a description; check the file")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MomifyError(f"{path} is not JSON ({_short(error)}); fetch the checkpoint again") from error
    except OSError as error:
        raise MomifyError(f"cannot read {path}: {_short(error)}; check the file and its permissions") from error
    if not isinstance(data, dict):
        raise MomifyError(f"{path} holds a JSON {type(data).__name__}, not an object; fetch the checkpoint again")
    return data


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, described without its data; `read` brings it into memory of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # its name in the file where torch has none
    strided: bool
    read: Callable[[], Tensor]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of weight files by name, each read anew when it is asked for and kept by nobody else.

    So that taking a model apart needs the memory of its parts and not of the file besides.
    """

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def read_tensors(folder: Path, files: Iterable[Path]) -> StoredTensors:
    """All tensors of `files` under their names there. Raises MomifyError for damaged files, and for code."""
    found: dict[str, Stored] = {}
    for path in files:
        describe = _describe_safetensors if path.suffix == ".safetensors" else _describe_bin
        _refuse_empty(path)
        for name, stored in describe(path).items():
            if name in found:
                raise MomifyError(f"tensor {shown(name)} lies in two shards of {folder}; fetch the checkpoint again")
            found[name] = stored
    return StoredTensors(found)


def _refuse_empty(path: Path) -> None:
    """Raise MomifyError for an empty file and for what `git clone` leaves without git-lfs."""
    with open(path, "rb") as stream:
        start = stream.read(40)
    if not start:
        raise MomifyError(f"{path} is empty; fetch the checkpoint again")
    if start.startswith(b"version https://git-lfs"):
        raise MomifyError(f"{path} is a git-lfs pointer, not the weights; run git lfs pull in its folder")


def _describe_safetensors(path: Path) -> dict[str, Stored]:
    """What the header says; the library has checked it against the size of the file."""
    found = {}
    with _damage(path), safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype(), part.get_dtype())
            found[name] = Stored(tuple(part.get_shape()), dtype, True, partial(_read_one, path, name))
    return found


def _read_one(path: Path, name: str) -> Tensor:
    with _damage(path), safe_open(path, "pt") as file:
        return file.get_tensor(name).clone()  # a view of the mapped file would keep all of it in memory


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what the safetensors library raises into a MomifyError that names the file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise MomifyError(f"{path} is truncated or damaged ({_short(error)}); fetch it again") from error


def _describe_bin(path: Path) -> dict[str, Stored]:
    _refuse_bomb(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise MomifyError(
            f"{path} is damaged or holds more than tensors; nothing in it was run, convert it to safetensors"
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise MomifyError(f"{path} is truncated or damaged ({_short(error)}); fetch it again") from error
    if not isinstance(data, dict):
        raise MomifyError(f"{path} holds a {type(data).__name__}, not a dictionary of tensors; convert it first")
    return {name: _in_memory(path, name, value) for name, value in data.items()}


def _refuse_bomb(path: Path) -> None:
    """Raise MomifyError for an archive that unpacks to more than it weighs; torch.save never packs."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error):
        return  # the format before 1.6, or damage that torch.load tells of
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if packed or sum(part.file_size for part in parts) > path.stat().st_size:
        raise MomifyError(f"{path} is packed so that it unpacks to more than it weighs; convert it to safetensors")


def _in_memory(path: Path, name: object, value: object) -> Stored:
    """A tensor of a .bin file. Raises MomifyError for anything else, and for one larger than its data."""
    if not (isinstance(name, str) and isinstance(value, Tensor)):
        raise MomifyError(f"{path}: {name!r:.80} is a {type(value).__name__}, not a tensor; save the weights alone")
    strided = value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
    if strided and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise MomifyError(f"{path}: tensor {shown(name)} claims more values than the file holds; fetch it again")
    return Stored(tuple(value.shape), value.dtype, strided, value.detach)


def shown(name: str) -> str:
    """A name out of a stranger's file, short and on one line."""
    return name[:80] if name.isprintable() else repr(name)[:80]


def _short(error: BaseException) -> str:
    """The first line of an error, at most 120 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
