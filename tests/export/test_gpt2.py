"""A MoM written as a GPT-2: transformers' own GPT-2 loads it and gives the MoM's logits."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from momify.convert.assemble import assemble, network_of
from momify.convert.homes import Request, choose_homes
from momify.convert.importance import Importance
from momify.convert.source import open_source
from momify.errors import MomifyError
from momify.export.gpt2 import export_gpt2
from momify.export.mom import export_mom
from momify.model import MomConfig, MomForCausalLM, MomForSequenceClassification
from momify.models import BUILTIN, load_dense, locate

CLOSE = 1e-4  # float32, logits of a few units
SIZES: dict = {
    "vocab_size": 53, "n_positions": 24, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40,
    "num_mha_modules": 2, "num_ffn_modules": 3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def fixed(mha: list[int], ffn: list[int], **changes: object) -> MomConfig:
    """A MoM whose step s runs mha[s] and ffn[s]; the size of the pool is SKIP."""
    tables = {"mha_homes": mha, "ffn_homes": ffn, "mha_reach": [[m] for m in mha], "ffn_reach": [[f] for f in ffn]}
    return MomConfig(**{**SIZES, "num_steps": len(mha), **tables, **changes})


def random_mom(config: MomConfig) -> MomForCausalLM:
    """Parameters large enough that a module in a wrong place shows, patches and deltas among them."""
    model = MomForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_f.weight" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1 if "wte" in name else 0.2)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def written(model: MomForCausalLM, folder: Path, **saving: object) -> Path:
    """`model` saved in `folder`/model and exported to `folder`/export."""
    model.save_pretrained(folder / "model", **saving)
    return export_gpt2(folder / "model", folder / "export")


def random_ids(config: MomConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, config.n_positions))


@st.composite
def configs(draw: st.DrawFn) -> MomConfig:
    """MoMs without choices: any homes and SKIPs, repeated modules, shapes and activations; parts as they may be."""
    mha_modules, ffn_modules = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    homes = st.tuples(st.integers(0, mha_modules), st.integers(0, ffn_modules))
    steps = draw(st.lists(homes, min_size=1, max_size=6))
    heads = draw(st.sampled_from([1, 2, 4]))
    patch_rank = draw(st.sampled_from([0, 0, 1, 3]))
    linear, others = ("gelu_new", "gelu", "silu", "relu", "quick_gelu"), ("tanh", "mish", "relu2")
    return fixed(
        [m for m, _ in steps],
        [f for _, f in steps],
        num_mha_modules=mha_modules,
        num_ffn_modules=ffn_modules,
        hidden_size=heads * draw(st.sampled_from([3, 8])),
        num_attention_heads=heads,
        intermediate_size=draw(st.sampled_from([6, 19, 32])),
        activation_function=draw(st.sampled_from(linear if patch_rank else linear + others)),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        tie_word_embeddings=draw(st.booleans()),
        modules_per_token=draw(st.integers(1, 2)),
        patch_rank=patch_rank,
        step_rank=draw(st.sampled_from([0, 0, 2])),
    )


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(0, 1000))
def test_logits_are_the_moms(config: MomConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model, ids = random_mom(config), random_ids(config)
    with tempfile.TemporaryDirectory() as name:
        found = GPT2LMHeadModel.from_pretrained(written(model, Path(name)))
    assert (logits(found, ids) - logits(model, ids)).abs().max() <= CLOSE
    assert (found.lm_head.weight is found.transformer.wte.weight) == config.tie_word_embeddings


def converted_demo(mha: int, ffn: int, **changes: object) -> MomForCausalLM:
    """The model that ships with momify, with half-layers taken out here and there."""
    source = open_source(locate(BUILTIN))
    layers = source.config.n_layer
    ranked = tuple(float(layer % 5) for layer in range(layers))
    importance = Importance("magnitude", layers, 1, 0.0, ranked, ranked[::-1])
    return assemble(source, network_of(source), choose_homes(importance, Request(mha, ffn, **changes)))


@pytest.mark.parametrize(("mha", "ffn", "changes"), [(6, 9, {}), (4, 8, {"mha_steps": 7, "ffn_steps": 12})])
def test_the_converted_demo(mha: int, ffn: int, changes: dict, tmp_path: Path) -> None:
    """A real source: the same logits through the auto class, the same text, and momify reads it as a source."""
    model = converted_demo(mha, ffn, **changes)
    target = written(model, tmp_path)
    found, ids = AutoModelForCausalLM.from_pretrained(target), torch.randint(0, 4096, (2, 200))
    assert type(found) is GPT2LMHeadModel
    assert (logits(found, ids) - logits(model, ids)).abs().max() <= CLOSE
    texts = [
        one.generate(ids[:1, :9], attention_mask=torch.ones(1, 9), max_new_tokens=12, do_sample=False, pad_token_id=0)
        for one in (found, model)
    ]
    assert torch.equal(*texts)
    dense = load_dense(open_source(target))
    assert torch.equal(logits(dense, ids), logits(found, ids))


def test_the_whole_pool_is_as_many_layers_as_the_source(tmp_path: Path) -> None:
    model, ids = converted_demo(12, 12), torch.randint(0, 4096, (1, 99))
    target = written(model, tmp_path)
    source = load_dense(open_source(locate(BUILTIN)))
    assert (logits(load_dense(open_source(target)), ids) - logits(source, ids)).abs().max() <= CLOSE
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["n_layer"]) == ("gpt2", ["GPT2LMHeadModel"], 12)


def test_zeros_add_exactly_nothing(tmp_path: Path) -> None:
    """Whatever else such a half holds: its residual stream is bitwise what went in."""
    model = random_mom(fixed([2, 0, 2], [0, 3, 1]))
    found = GPT2LMHeadModel.from_pretrained(written(model, tmp_path))
    assert found.config.n_layer == 2
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert torch.equal(found.transformer.h[0].attn(x)[0], torch.zeros_like(x))


def test_a_step_of_nothing_is_a_layer_of_zeros(tmp_path: Path) -> None:
    model = random_mom(fixed([2], [3]))
    found, ids = GPT2LMHeadModel.from_pretrained(written(model, tmp_path)), random_ids(model.config)
    assert found.config.n_layer == 1
    assert (logits(found, ids) - logits(model, ids)).abs().max() <= CLOSE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_of_the_file_stays_where_nothing_is_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_mom(fixed([0, 1, 2], [0, 1, 3], patch_rank=2)).to(dtype)
    found = load_file(written(model, tmp_path) / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    same = model.float()
    read = GPT2LMHeadModel.from_pretrained(tmp_path / "export", dtype=torch.float32)
    ids = random_ids(model.config)
    assert (logits(read, ids) - logits(same, ids)).abs().max() <= CLOSE


def test_folded_deltas_are_not_rounded_to_16_bits(tmp_path: Path) -> None:
    model = random_mom(fixed([0, 0], [0, 1], step_rank=2)).to(torch.float16)
    read = GPT2LMHeadModel.from_pretrained(written(model, tmp_path))
    assert read.dtype == torch.float32
    ids = random_ids(model.config)
    assert (logits(read, ids) - logits(model.float(), ids)).abs().max() <= CLOSE


def test_shards_are_read_and_written_whole(tmp_path: Path) -> None:
    model, ids = random_mom(fixed([0, 1], [2, 0])), torch.randint(0, 53, (2, 9))
    target = written(model, tmp_path, max_shard_size="10KB")
    assert sorted(path.name for path in target.glob("*.safetensors*")) == ["model.safetensors"]
    assert (logits(GPT2LMHeadModel.from_pretrained(target), ids) - logits(model, ids)).abs().max() <= CLOSE


def test_what_lies_in_the_folder_and_what_is_said(tmp_path: Path) -> None:
    model = random_mom(fixed([0, 0, 2], [0, 1, 1]))
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "training_args.bin", "evil.py"):
        (tmp_path / "model" / name).write_text("{}")
    record = {"source": {"model": "gpt2-large", "sha256": "ab" * 32}, "trained": {"steps": 7, "tokens": 70}}
    record["plan"] = {"num_layers": 4}
    (tmp_path / "model" / "momify.json").write_text(json.dumps(record))
    lines: list[str] = []
    target = export_gpt2(tmp_path / "model", tmp_path / "export", None, lines.append)
    assert {path.name for path in target.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "momify.json", "README.md", "tokenizer.json",
    }  # fmt: skip
    assert json.loads((target / "momify.json").read_text())["export"]["format"] == "gpt2"
    card = (target / "README.md").read_text()
    assert "# gpt2-large, made smaller, as a plain GPT-2" in card
    assert "trust_remote_code" not in card
    assert lines[0] == "3 GPT-2 layers run 2 attention and 3 feed-forward halves, with the MoM's logits"
    *sentences, changes = lines
    assert all(f"- {line}\n" in card for line in sentences)
    assert "| | source | MoM | GPT-2 |" in card.replace("|  |", "| |")
    assert changes.count("source ") == changes.count("MoM ") == changes.count("GPT-2 ") == 3


def test_exports_replace_exports_and_nothing_else(tmp_path: Path) -> None:
    model = random_mom(fixed([0, 1], [2, 0]))
    target = written(model, tmp_path)
    export_mom(tmp_path / "model", target)
    assert (target / "config.py").exists()
    export_gpt2(tmp_path / "model", target)
    assert not (target / "config.py").exists()
    with pytest.raises(MomifyError, match="model folder itself"):
        export_gpt2(tmp_path / "model", tmp_path / "model")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(MomifyError, match="something else"):
        export_gpt2(tmp_path / "model", tmp_path / "thesis")
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "years of work"


SKIPS = {"mha_reach": [[0], [2]], "mha_homes": [0, 2]}
REFUSED: list[tuple[dict, str]] = [
    ({"mha_reach": [[0], [1, 2]]}, "tokens choose at 1 of 4 half-steps .*--format mom"),
    ({"mha_reach": None, "modules_per_token": 2}, "tokens choose at 2 of 4 half-steps .*--format mom"),
    ({"activation_function": "tanh", "patch_rank": 1, **SKIPS}, "'tanh'.*--format mom.*patch_rank=0"),
    ({"patch_rank": 21, **SKIPS}, "needs an inner width of 42.*--format mom.*patch_rank=20"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_what_no_gpt2_equals_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(MomifyError, match=words):
        written(random_mom(fixed([0, 1], [2, 0], **changes)), tmp_path)
    assert not (tmp_path / "export").exists()


def test_an_activation_without_the_identity_is_fine_where_no_step_has_a_patch(tmp_path: Path) -> None:
    written(random_mom(fixed([0, 1], [2, 0], activation_function="tanh", patch_rank=3)), tmp_path)


def test_models_that_are_no_whole_language_model(tmp_path: Path, make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    folder = tmp_path / "model"
    make_gpt2().save_pretrained(folder)
    with pytest.raises(MomifyError, match="'gpt2'"):
        export_gpt2(folder, tmp_path / "export")
    MomForSequenceClassification(fixed([0, 1], [2, 0])).save_pretrained(folder)
    with pytest.raises(MomifyError, match=r"classifier.*--format mom"):
        export_gpt2(folder, tmp_path / "export")
    random_mom(fixed([0, 1], [2, 0])).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.ffn.up.bias"][2, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MomifyError, match=r"h\.0\.mlp\.c_fc\.bias would not be finite"):
        export_gpt2(folder, tmp_path / "export")
    del tensors["model.ffn.up.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MomifyError, match=r"lacks tensor model\.ffn\.up\.bias"):
        export_gpt2(folder, tmp_path / "export")
    with pytest.raises(MomifyError, match="does not exist"):
        export_gpt2(tmp_path / "nowhere", tmp_path / "export")
    assert not (tmp_path / "export").exists()
