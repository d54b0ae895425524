"""Saving and loading: bit for bit, nothing missing, nothing left uninitialised."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import momify.model
from momify.model import MomConfig, MomForCausalLM, MomForSequenceClassification

REACH: dict[str, Any] = {"mha_reach": [[0, 3], [1], [3], [1, 2]], "mha_homes": [3, 1, 3, 2]}


def reload(model: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, output_loading_info=True, **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router_hidden", [0, 8])
@pytest.mark.parametrize("ranks", [{}, {"patch_rank": 3, "step_rank": 2, "mha_homes": [3, 1, 3, 1]}], ids=str)
@torch.no_grad()
def test_save_and_load_bit_for_bit(make_mom, token_ids, tmp_path, tied, dtype, router_hidden, ranks) -> None:
    model = make_mom(tie_word_embeddings=tied, router_hidden=router_hidden, **{**REACH, **ranks}).to(dtype)
    again, info = reload(model, tmp_path)
    assert not any(info.values()), info
    assert again.dtype == dtype
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    names = {name for name in model.state_dict() if name != "lm_head.weight" or not tied}
    assert set(load_file(tmp_path / "model.safetensors")) == names
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert (again.lm_head.weight is again.model.wte.weight) == tied
    assert torch.equal(again.eval()(token_ids).logits, model(token_ids).logits)


def test_state_names_are_the_documented_ones(make_mom) -> None:
    shapes = {name: tuple(p.shape) for name, p in make_mom(**REACH).named_parameters()}
    assert shapes == {
        "model.wte.weight": (61, 32), "model.wpe.weight": (48, 32),
        "model.ln_f.weight": (32,), "model.ln_f.bias": (32,),
        "model.mha.qkv.weight": (3, 32, 96), "model.mha.qkv.bias": (3, 96),
        "model.mha.out.weight": (3, 32, 32), "model.mha.out.bias": (3, 32),
        "model.ffn.up.weight": (4, 32, 48), "model.ffn.up.bias": (4, 48),
        "model.ffn.down.weight": (4, 48, 32), "model.ffn.down.bias": (4, 32),
        "model.mha_router.weight": (2, 32, 4), "model.mha_router.bias": (2, 4),
        "model.ffn_router.weight": (4, 32, 5), "model.ffn_router.bias": (4, 5),
    }  # fmt: skip


def test_nothing_is_left_uninitialised(make_mom, token_ids, tmp_path) -> None:
    """Built on the meta device: buffers come from the config, a router that the file lacks starts at its homes."""
    model = make_mom(**REACH)
    kept = {n: t for n, t in model.state_dict().items() if "mha_router" not in n and n != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=kept)
    again, info = MomForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.mha_router.weight", "model.mha_router.bias"}
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert [name for name, _ in again.named_buffers()] == ["model.mha_router.closed", "model.ffn_router.closed"]
    router = again.model.mha_router
    assert router.closed.tolist() == [[False, True, True, False], [True, False, False, True]]
    assert torch.equal(router.weight, torch.zeros(2, 32, 4))
    assert router.bias.tolist() == [[0, 0, 0, 4], [0, 0, 4, 0]]
    assert torch.equal(again.model.mha.qkv.weight, model.model.mha.qkv.weight)
    assert torch.isfinite(again(token_ids).logits).all()


def test_fresh_model_starts_as_gpt2_does() -> None:
    model = MomForCausalLM(MomConfig(hidden_size=64, intermediate_size=128, num_steps=8, num_attention_heads=4))
    body = model.model

    def close(tensor: Tensor, std: float) -> bool:
        return abs(tensor.std().item() / std - 1) < 0.05 and abs(tensor.mean().item()) < std / 10

    for tensor in (body.wte.weight, body.mha.qkv.weight, body.ffn.up.weight):
        assert close(tensor, 0.02)
    for tensor in (body.mha.out.weight, body.ffn.down.weight):
        assert close(tensor, 0.02 / 4)  # 0.02 / sqrt(2 * 8)
    for stack in (body.mha.qkv, body.mha.out, body.ffn.up, body.ffn.down):
        assert stack.bias.abs().max() == 0


def test_a_language_model_loads_into_a_classifier(make_mom, token_ids, tmp_path) -> None:
    model = make_mom(pad_token_id=0)
    model.save_pretrained(tmp_path)
    again, info = MomForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert again(token_ids).logits.shape == (3, 3)
    assert torch.equal(again.model.mha.qkv.weight, model.model.mha.qkv.weight)


def test_larger_vocabulary_keeps_the_head_tied(make_mom) -> None:
    model = make_mom()
    model.resize_token_embeddings(64)
    assert model.lm_head.weight is model.model.wte.weight
    assert model(torch.tensor([[63]])).logits.shape == (1, 1, 64)


def test_files_can_be_exported_flat() -> None:
    """An export carries these files alone: torch, transformers, the standard library, siblings as .name."""
    folder = Path(momify.model.__file__).parent
    allowed = {"torch", "transformers", "typing", "dataclasses", "collections", "functools", "math", "os"}
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                may = allowed | ({"triton"} if node.col_offset else set())  # inside try ... except ImportError
                assert {alias.name.split(".")[0] for alias in node.names} <= may, path.name
            if isinstance(node, ast.ImportFrom):
                sibling = node.level == 1 and node.module and (folder / f"{node.module}.py").is_file()
                assert sibling or (not node.level and node.module.split(".")[0] in allowed), path.name
