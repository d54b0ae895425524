"""Export as `gpt2`: a MoM without choices as a plain GPT-2, which every GPT-2 tool loads; the logits stay the same."""

import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights

from momify.convert.assemble import SHARED_FIELDS
from momify.convert.stored_mom import HEAD, StoredMom, model_class, open_mom
from momify.convert.weight_files import inside, read_json
from momify.errors import MomifyError
from momify.export.card import gpt2_card
from momify.export.fold import carries_linear, gpt2_state
from momify.export.folder import PROVENANCE, Json, check_target, companions, provenance
from momify.export.packing import Layer, fixed_halves, is_patch, pack
from momify.export.written import Written
from momify.files import whole_folder, write_json, write_text
from momify.model import MomConfig, MomForCausalLM


def export_gpt2(
    model_folder: Path, target: Path, report: Json | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the MoM in `model_folder` as a GPT2LMHeadModel to `target`, whole or not at all, and return `target`.

    `say` gets what the writing costs, a line at a time; the card has it too, and the quality that `report` (a
    report.json) measured. Raises MomifyError for a folder that is no complete MoM, for a MoM that no plain GPT-2
    equals, and for a `target` that holds something else than an earlier export.
    """
    model_folder, target = Path(model_folder), Path(target)
    stored = _open(model_folder)
    layers = pack(fixed_halves(stored.config))
    check_patches(stored.config, layers)
    config = gpt2_config(stored.config, len(layers))
    check_target(model_folder, target)
    record = provenance(model_folder, "gpt2")
    written = Written(stored.config, config, layers, _source_layers(record))
    model = build_gpt2(stored, config, layers)
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
        for path in companions(model_folder):
            shutil.copyfile(path, folder / path.name)
        write_json(folder / PROVENANCE, record)
        write_text(folder / "README.md", gpt2_card(written, record, report))
    for line in (*written.lines(), written.changes()):
        say(line)
    return target


def _open(folder: Path) -> StoredMom:
    """The checked causal MoM in `folder`."""
    if not folder.is_dir():
        raise MomifyError(f"model folder {folder} does not exist; give a folder that momify convert or train wrote")
    path = inside(folder, "config.json")
    if path.is_file() and model_class(read_json(path)) is not MomForCausalLM:
        raise MomifyError(f"{folder} holds a classifier; --format gpt2 writes language models, use --format mom")
    return open_mom(folder)


def _source_layers(record: Json) -> int | None:
    """Layers of the source, as the conversion recorded its plan."""
    plan = record.get("plan")
    layers = plan.get("num_layers") if isinstance(plan, dict) else None
    return layers if isinstance(layers, int) and 0 < layers < 1 << 16 else None


def gpt2_config(config: MomConfig, layers: int) -> GPT2Config:
    """The GPT-2 of `layers` layers that a MoM of `config` is written as."""
    return GPT2Config(
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        tie_word_embeddings=config.tie_word_embeddings,
        n_embd=config.hidden_size,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        n_layer=layers,
    )


def check_patches(config: MomConfig, layers: tuple[Layer, ...]) -> None:
    """Raise MomifyError where a patch is no feed-forward half of a GPT-2 of this activation and inner width."""
    if not any(is_patch(half) for layer in layers for half in layer.halves):
        return
    act, rank, inner = config.activation_function, config.patch_rank, config.intermediate_size
    if not carries_linear(act):
        raise MomifyError(
            f"a patch is linear, which a feed-forward with {act!r} cannot be (act(z) - act(-z) is not z); "
            "use --format mom, or convert with mom.patch_rank=0"
        )
    if 2 * rank > inner:
        raise MomifyError(
            f"a patch of rank {rank} needs an inner width of {2 * rank}, the model's is {inner}; "
            f"use --format mom, or convert with mom.patch_rank={inner // 2} or less"
        )


def build_gpt2(stored: StoredMom, config: GPT2Config, layers: tuple[Layer, ...]) -> GPT2LMHeadModel:
    """transformers' GPT-2 filled with the MoM's tensors, in memory once.

    Raises MomifyError for values that are not finite.
    """
    state = gpt2_state(stored.tensors, layers, config.n_inner, written_type(stored))
    for name, tensor in state.items():
        if not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            raise MomifyError(f"{stored.folder}: {name} would not be finite; go back to an earlier checkpoint")
    with no_init_weights():
        model = GPT2LMHeadModel(config)
    outcome = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name in outcome.missing_keys if not (config.tie_word_embeddings and name == HEAD)]
    assert not missing + outcome.unexpected_keys, f"export and transformers disagree: {outcome}"
    return model.eval()


def written_type(stored: StoredMom) -> torch.dtype:
    """The type of the MoM's file; at least float32 where deltas make numbers that 16 bits would round."""
    kind = reduce(torch.promote_types, (tensor.dtype for tensor in stored.tensors.stored.values()))
    adapted = any(stored.config.adapted(kind) for kind in ("mha", "ffn"))
    return torch.promote_types(kind, torch.float32) if adapted else kind
