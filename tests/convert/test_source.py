"""Which folders count as a GPT-2 checkpoint, what is read from them, and every refusal with its line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from momify.convert.source import open_source
from momify.errors import MomifyError

FORMS = ("safetensors", "sharded-safetensors", "bin", "sharded-bin", "no-prefix", "old-buffers")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add, or (None) drop tensors; names with "__" for dots, under "transformer."."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        full = "transformer." + name.replace("__", ".")
        if tensor is None:
            del tensors[full]
        else:
            tensors[full] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_tensors(make_gpt2, save_gpt2, form):
    model = make_gpt2()
    source = open_source(save_gpt2(model, form))
    expected = model.transformer.state_dict()
    assert source.tensors.keys() == expected.keys()
    assert all(torch.equal(source.tensors[name], expected[name]) for name in expected)
    assert (source.tied, source.dtype, source.name) == (True, torch.float32, "source")
    assert len(source.sha256) == 64


def test_the_files_dtype_is_kept_and_mixed_files_count_as_the_widest(make_gpt2, save_gpt2):
    for dtype in (torch.float16, torch.bfloat16):
        source = open_source(save_gpt2(make_gpt2().to(dtype), name=str(dtype)))
        assert source.dtype == dtype
        assert source.tensors["wte.weight"].dtype == dtype
    folder = save_gpt2(make_gpt2().half(), name="mixed")
    edit_tensors(folder, ln_f__bias=torch.zeros(32))
    assert open_source(folder).dtype == torch.float32


@pytest.mark.parametrize("said", [True, False])
def test_a_head_of_its_own(make_gpt2, save_gpt2, said):
    model = make_gpt2(tie_word_embeddings=False)
    folder = save_gpt2(model)
    edit_config(folder, tie_word_embeddings=said)  # true beside a head that differs: untied, as in transformers
    source = open_source(folder)
    assert not source.tied
    assert not source.config.tie_word_embeddings
    assert torch.equal(source.tensors["lm_head.weight"], model.lm_head.weight)


def test_a_copy_of_the_embedding_is_no_head_of_its_own(make_gpt2, save_gpt2):
    folder = save_gpt2(make_gpt2())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    source = open_source(folder)
    assert source.tied
    assert "lm_head.weight" not in source.tensors


def test_the_hash_follows_weights_and_config(make_gpt2, save_gpt2):
    model = make_gpt2()
    folder = save_gpt2(model)
    first, again = open_source(folder).sha256, open_source(folder).sha256
    edit_tensors(folder, ln_f__bias=torch.zeros(32))
    other = open_source(folder).sha256
    edit_config(folder, scale_attn_weights=False)
    assert first == again
    assert len({first, other, open_source(folder).sha256}) == 3


SIZES = {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 48, "vocab_size": 61}
FAMILY = {
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "distilgpt2": {
        "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "model_type": "gpt2",
        "pruned_heads": {}, "n_ctx": 1024, "layer_norm_epsilon": 1e-05,
    },
    "DialoGPT": {
        "model_type": "gpt2", "n_ctx": 1024, "task_specific_params": {"conversational": {"max_length": 1000}},
    },
    "cerebras": {
        "model_type": "gpt2", "activation_function": "gelu", "n_inner": 128, "attn_pdrop": 0.0,
        "reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True,
        "torch_dtype": "float32", "transformers_version": "4.26.0", "use_cache": True,
    },
    "codeparrot": {
        "model_type": "gpt2", "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": True, "torch_dtype": "float32", "transformers_version": "4.15.0",
    },
    "sizes under their common names": {
        "model_type": "gpt2", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4,
        "max_position_embeddings": 48,
    },
    "nothing that could matter": {"model_type": "gpt2", "torch_dtype": "floaty", "auto_map": {"AutoModel": "x.y"}},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_configs_as_they_lie_on_the_hub(make_gpt2, save_gpt2, name):
    folder = save_gpt2(make_gpt2())
    aliased = {"hidden_size"} & FAMILY[name].keys()
    sizes = {"vocab_size": 61} if aliased else SIZES
    (folder / "config.json").write_text(json.dumps({**sizes, **FAMILY[name]}))
    config = open_source(folder).config
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (32, 4, 4, 48)
    for key in ("activation_function", "n_inner", "attn_pdrop", "scale_attn_by_inverse_layer_idx"):
        if key in FAMILY[name]:
            assert getattr(config, key) == FAMILY[name][key]


def test_a_folder_of_the_hubs_cache(make_gpt2, save_gpt2, tmp_path):
    plain = save_gpt2(make_gpt2())
    root = tmp_path / "models--openai-community--gpt2"
    snapshot = root / "snapshots" / "607a30d7"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for file in plain.iterdir():
        shutil.copy(file, root / "blobs" / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-of-{file.name}")
    source = open_source(snapshot)
    assert source.name == "openai-community/gpt2"
    assert source.sha256 == open_source(plain).sha256


CONFIG_REFUSALS = {
    "another model": ({"model_type": "llama"}, r"model_type is 'llama'; momify converts model_type 'gpt2' only"),
    "no model type": ({"model_type": None}, r"model_type is None"),
    "cross-attention": ({"add_cross_attention": True}, r"add_cross_attention is true"),
    "quantized": ({"quantization_config": {"bits": 4}}, r"quantization_config is set"),
    "pruned heads": ({"pruned_heads": {"0": [1]}}, r"pruned_heads is \{'0': \[1\]\}"),
    "unknown activation": ({"activation_function": "geglu"}, r"activation_function 'geglu' is unknown"),
    "learned activation": ({"activation_function": "prelu"}, r"activation_function 'prelu' .*own parameters"),
    "heads do not divide": ({"n_head": 5}, r"n_embd 32 does not divide by n_head 5"),
    "no layers": ({"n_layer": 0}, r"n_layer is 0; it must be 1 to"),
    "a number of 400 digits": ({"n_embd": 10**400}, r"n_embd is 10{19}; it must be 1 to 268,435,456$"),
    "negative inner width": ({"n_inner": -4}, r"n_inner is -4"),
    "no vocabulary": ({"vocab_size": 0}, r"vocab_size is 0"),
    "text for a number": ({"n_embd": "32"}, r"not a GPT-2 config \(.*n_embd.*expected int, got str"),
    "epsilon 0": ({"layer_norm_epsilon": 0.0}, r"layer_norm_epsilon is 0.0"),
    "dropout 2": ({"resid_pdrop": 2.0}, r"resid_pdrop is 2.0"),
    "fewer layers than the file": ({"n_layer": 3}, r"has unexpected tensors h\.3\..* and 9 more"),
    "more layers than the file": ({"n_layer": 5}, r"misses tensors h\.4\..* and 9 more"),
    "a hundred million layers": ({"n_layer": 10**8}, r"52 tensors, too few for n_layer 100000000"),
    "another vocabulary": ({"vocab_size": 60}, r"wte\.weight has shape \(61, 32\).* asks for \(60, 32\)"),
    "another inner width": ({"n_inner": 64}, r"mlp\.c_fc\.weight has shape \(32, 128\).*\(32, 64\)"),
    "no head although untied": ({"tie_word_embeddings": False}, r"misses tensors lm_head\.weight"),
}


@pytest.mark.parametrize("case", CONFIG_REFUSALS)
def test_config_is_refused_by_name(make_gpt2, save_gpt2, case):
    changes, message = CONFIG_REFUSALS[case]
    folder = save_gpt2(make_gpt2())
    edit_config(folder, **changes)
    refuse(folder, message)


TENSOR_REFUSALS = {
    "missing": ({"h__1__ln_2__bias": None}, r"misses tensors h\.1\.ln_2\.bias; give a complete checkpoint"),
    "extra": ({"h__0__attn__gate": torch.zeros(2)}, r"has unexpected tensors h\.0\.attn\.gate"),
    "shape": ({"ln_f__bias": torch.zeros(31)}, r"ln_f\.bias has shape \(31,\)"),
    "transposed": ({"h__2__attn__c_attn__weight": torch.zeros(96, 32)}, r"c_attn\.weight has shape \(96, 32\)"),
    "NaN": ({"h__3__mlp__c_proj__bias": torch.full((32,), torch.nan)}, r"h\.3\.mlp\.c_proj\.bias holds NaN"),
    "infinity": ({"wpe__weight": torch.zeros(48, 32).index_fill(0, torch.tensor([9]), -torch.inf)}, r"wpe.*infinity"),
    "float64 beyond float32": (
        {"ln_f__bias": torch.full((32,), 1e300, dtype=torch.float64)},
        r"ln_f.*numbers beyond float32",
    ),
    "integers": ({"ln_f__weight": torch.ones(32, dtype=torch.int8)}, r"ln_f\.weight is int8.*unquantized"),
    "float8": ({"ln_f__weight": torch.ones(32).to(torch.float8_e4m3fn)}, r"ln_f\.weight is float8_e4m3fn"),
}


@pytest.mark.parametrize("case", TENSOR_REFUSALS)
def test_tensors_are_refused_by_name(make_gpt2, save_gpt2, case):
    changes, message = TENSOR_REFUSALS[case]
    folder = save_gpt2(make_gpt2())
    edit_tensors(folder, **changes)
    refuse(folder, message)


def test_a_tensor_under_two_names_is_refused(make_gpt2, save_gpt2):
    folder = save_gpt2(make_gpt2())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "ln_f.bias": torch.zeros(32)}, folder / "model.safetensors")
    refuse(folder, r"ln_f\.bias is there twice, with and without 'transformer\.'")


def test_no_folder_a_file_and_no_config_are_refused(make_gpt2, save_gpt2, tmp_path):
    folder = save_gpt2(make_gpt2())
    refuse(tmp_path / "nowhere", r"nowhere does not exist; give a folder")
    refuse(folder / "config.json", r"config\.json is a file, not a folder")
    (folder / "config.json").unlink()
    refuse(folder, r"no config\.json in .*source")


@pytest.mark.parametrize(
    ("junk", "message"),
    [
        (b"{ not json", r"config\.json is not JSON"),
        (b"", r"config\.json is not JSON"),
        (b"\xff\xfe\x00", r"config\.json is not JSON"),
        (b"[1, 2]", r"config\.json holds a JSON list, not an object"),
        (b"[" * 200_000, r"config\.json is not JSON"),
    ],
)
def test_a_junk_config_is_refused(make_gpt2, save_gpt2, junk, message):
    folder = save_gpt2(make_gpt2())
    (folder / "config.json").write_bytes(junk)
    refuse(folder, message)


def test_a_config_outside_the_folder_is_refused(make_gpt2, save_gpt2, tmp_path):
    folder = save_gpt2(make_gpt2())
    os.replace(folder / "config.json", tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    refuse(folder, r"'config\.json' leads out of the model folder")


def refuse(folder: Path, message: str) -> None:
    """Opening must raise a MomifyError of one line that matches."""
    with pytest.raises(MomifyError, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
