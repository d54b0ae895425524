"""Weight files from strangers: damaged, executable, or pointing elsewhere."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from momify.convert.source import open_source
from momify.convert.weight_files import find_weight_files, inside
from momify.errors import MomifyError

INDEX = "model.safetensors.index.json"


class Touches:
    """Unpickled, this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def edit_map(folder: Path, file: str) -> None:
    """Let the index say that ln_f.bias lies in `file`."""
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"]["transformer.ln_f.bias"] = file
    (folder / INDEX).write_text(json.dumps(data))


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(MomifyError, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


def test_code_in_a_bin_is_refused_and_does_not_run(make_gpt2, save_gpt2, tmp_path):
    model, marker = make_gpt2(), tmp_path / "it-ran"
    folder = save_gpt2(model, "bin")
    state = {**model.state_dict(), "evil": Touches(marker)}
    torch.save(state, folder / "pytorch_model.bin")
    refuse(folder, r"pytorch_model\.bin is damaged or holds more than tensors; nothing in it was run")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touches(marker), protocol=2))
    refuse(folder, r"pytorch_model\.bin is .*damaged")
    assert not marker.exists()
    torch.load(_with_code(tmp_path, marker), weights_only=False)  # the trap itself works
    assert marker.exists()


def _with_code(folder: Path, marker: Path) -> Path:
    torch.save({"evil": Touches(marker)}, folder / "trap.bin")
    return folder / "trap.bin"


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(make_gpt2, save_gpt2, form, keep):
    folder = save_gpt2(make_gpt2(), form)
    path = find_weight_files(folder)[0]
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refuse(folder, rf"{path.name} is (truncated or )?(damaged|empty)")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_garbage_is_refused(make_gpt2, save_gpt2, form):
    folder = save_gpt2(make_gpt2(), form)
    find_weight_files(folder)[0].write_bytes(os.urandom(5000))
    refuse(folder, "damaged")


def test_extra_bytes_behind_safetensors_are_refused(make_gpt2, save_gpt2):
    folder = save_gpt2(make_gpt2())
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(b"more")
    refuse(folder, "truncated or damaged")


def test_a_git_lfs_pointer_is_named(make_gpt2, save_gpt2):
    folder = save_gpt2(make_gpt2())
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refuse(folder, "is a git-lfs pointer, not the weights; run git lfs pull")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], r"holds a list, not a dictionary of tensors"),
        ({"state_dict": {}}, r"'state_dict' is a dict, not a tensor"),
        ({3: torch.zeros(2)}, r"3 is a Tensor, not a tensor|3 is a Tensor"),
    ],
)
def test_a_bin_of_something_else_is_refused(make_gpt2, save_gpt2, content, message):
    folder = save_gpt2(make_gpt2(), "bin")
    torch.save(content, folder / "pytorch_model.bin")
    refuse(folder, message)


def test_a_sparse_tensor_is_refused(make_gpt2, save_gpt2):
    folder = save_gpt2(make_gpt2(), "bin")
    state = make_gpt2().transformer.state_dict()
    torch.save({**state, "ln_f.weight": torch.ones(32).to_sparse()}, folder / "pytorch_model.bin")
    refuse(folder, r"ln_f\.weight is float32, sparse_coo; weights must be")


def test_no_weights_are_refused_with_the_names_looked_for(make_gpt2, save_gpt2):
    folder = save_gpt2(make_gpt2())
    os.replace(folder / "model.safetensors", folder / "tf_model.h5")
    refuse(folder, r"no weights in .*it needs one of model\.safetensors, .*pytorch_model\.bin")


def test_safetensors_win_over_a_bin(make_gpt2, save_gpt2):
    model, other = make_gpt2(), make_gpt2()
    folder = save_gpt2(other, "bin")
    save_gpt2(model)
    assert torch.equal(open_source(folder).tensors["wte.weight"], model.transformer.wte.weight)


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", "..\\x.safetensors"],
)
def test_a_shard_path_that_leaves_the_folder_is_refused(make_gpt2, save_gpt2, tmp_path, file):
    folder = save_gpt2(make_gpt2(), "sharded-safetensors")
    save_file({"transformer.ln_f.bias": torch.zeros(32)}, tmp_path / "x.safetensors")
    edit_map(folder, file)
    refuse(folder, r"leads out of the model folder")


def test_a_link_that_leaves_the_folder_is_refused(make_gpt2, save_gpt2, tmp_path):
    folder = save_gpt2(make_gpt2(), "sharded-safetensors")
    save_file({"transformer.ln_f.bias": torch.zeros(32)}, tmp_path / "x.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    edit_map(folder, "link.safetensors")
    refuse(folder, r"'link\.safetensors' leads out of the model folder")
    (tmp_path / "blobs").mkdir()  # a cache's blobs lie beside snapshots, nowhere else
    os.replace(tmp_path / "x.safetensors", tmp_path / "blobs" / "x.safetensors")
    (folder / "link.safetensors").unlink()
    (folder / "link.safetensors").symlink_to(tmp_path / "blobs" / "x.safetensors")
    refuse(folder, r"leads out of the model folder")


def test_links_within_the_folder_are_fine(make_gpt2, save_gpt2):
    folder = save_gpt2(make_gpt2())
    os.replace(folder / "model.safetensors", folder / "real.safetensors")
    (folder / "model.safetensors").symlink_to("real.safetensors")
    assert inside(folder, "model.safetensors").is_file()
    assert open_source(folder).tied


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("gone.safetensors", r"gone\.safetensors is missing, model\.safetensors\.index\.json names it"),
        ("config.json", r"another kind"),
        (7, r"names 7 as the file of transformer\.ln_f\.bias"),
    ],
)
def test_a_shard_that_is_not_there_or_no_shard_is_refused(make_gpt2, save_gpt2, file, message):
    folder = save_gpt2(make_gpt2(), "sharded-safetensors")
    edit_map(folder, file)
    refuse(folder, message)


def test_a_tensor_in_two_shards_or_in_none_is_refused(make_gpt2, save_gpt2):
    folder = save_gpt2(make_gpt2(), "sharded-safetensors")
    save_file({"transformer.ln_f.bias": torch.zeros(32)}, folder / "more.safetensors")
    edit_map(folder, "more.safetensors")
    refuse(folder, r"transformer\.ln_f\.bias lies in two shards")
    save_file({"transformer.ln_f.gain": torch.zeros(32)}, folder / "more.safetensors")
    refuse(folder, r"has unexpected tensors ln_f\.gain")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "{"])
def test_a_broken_index_is_refused(make_gpt2, save_gpt2, content):
    folder = save_gpt2(make_gpt2(), "sharded-safetensors")
    (folder / INDEX).write_text(content)
    refuse(folder, r"has no weight_map|is not JSON")
