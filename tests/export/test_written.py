"""What writing a MoM as a GPT-2 costs: the sums hold to the digit, parameters are those of the real models."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel

from momify.export.gpt2 import gpt2_config
from momify.export.packing import fixed_halves, pack
from momify.export.written import Written
from momify.measure.cost import kv_bytes_per_token, parameters
from momify.model import MomConfig, MomForCausalLM

SIZES: dict = {
    "vocab_size": 40, "n_positions": 16, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
    "num_mha_modules": 2, "num_ffn_modules": 2,
}  # fmt: skip


def write(mha: list[int], ffn: list[int], **changes: object) -> Written:
    """A MoM whose step s runs mha[s] and ffn[s], 2 being SKIP, and its GPT-2."""
    tables = {"mha_homes": mha, "ffn_homes": ffn, "mha_reach": [[m] for m in mha], "ffn_reach": [[f] for f in ffn]}
    config = MomConfig(**{**SIZES, "num_steps": len(mha), **tables, **changes})
    layers = pack(fixed_halves(config))
    return Written(config, gpt2_config(config, len(layers)), layers)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=6))
def test_zeros_are_all_that_is_added(steps: list[tuple[int, int]]) -> None:
    found = write([m for m, _ in steps], [f for _, f in steps])
    mom, gpt2 = found.macs
    assert mom + found.idle_macs == gpt2
    assert kv_bytes_per_token(found.mom) + found.idle_cache == kv_bytes_per_token(found.gpt2)
    for config, model in ((found.mom, MomForCausalLM(found.mom)), (found.gpt2, GPT2LMHeadModel(found.gpt2))):
        assert parameters(config).total == model.num_parameters()


def test_sentences() -> None:
    packed, zeros, again = write([0, 0, 2, 1], [0, 1, 1, 2]).lines()
    assert packed == "4 GPT-2 layers run 3 attention and 3 feed-forward halves, with the MoM's logits"
    # one attention of 4 x 16 x 16 a token and 2 x 16 x 16 of core, one feed-forward of 2 x 16 x 24, 16 tokens
    idle = 16 * (4 * 256 + 2 * 256 + 2 * 16 * 24)
    assert zeros.startswith("1 attention and 1 feed-forward halves are zeros, which add nothing")
    assert f"computed all the same: {idle / 1000:.1f} k of the" in zeros
    assert zeros.endswith("64 B of the 256 B of KV cache")  # 2 x 16 values of 2 bytes in each of 4 layers
    assert again.startswith("2 halves run a module that an earlier one has")


def test_the_source_stands_beside_where_it_is_known() -> None:
    """A patch in each attention's place: six feed-forward halves, where the source has three."""
    cheap, dear = write([0, 1], [0, 1]), write([2, 2, 2], [0, 1, 0], patch_rank=2)
    cheap, dear = replace(cheap, source_layers=3), replace(dear, source_layers=3)
    assert [len(row) for row in (cheap.head(), *cheap.rows())] == [4] * 4
    assert not any("source" in line for line in cheap.lines())
    assert dear.lines()[-1].endswith("--format mom keeps what was saved")
    source = GPT2LMHeadModel(dear.source)
    assert source.config.n_layer == 3
    assert dear.changes().startswith(f"parameters: source {source.num_parameters() / 1000:.2f} k, MoM ")


def test_nothing_is_said_of_what_is_not_there() -> None:
    assert len(write([0, 1], [0, 1]).lines()) == 1
    assert "1 patches of rank 3 are feed-forward halves" in write([0, 1], [0, 2], patch_rank=3).lines()[-1]
