"""The model card: what the hub reads, what a reader reads, and that a hostile name stays text."""

import re

import yaml

from momify.export.card import gpt2_card, model_card
from momify.export.gpt2 import gpt2_config
from momify.export.packing import fixed_halves, pack
from momify.export.written import Written
from momify.model import MomConfig

CONFIG = {
    "model_type": "mom", "vocab_size": 50257, "hidden_size": 1280, "num_attention_heads": 20,
    "intermediate_size": 5120, "num_mha_modules": 8, "num_ffn_modules": 36, "num_steps": 36,
    "mha_homes": [s % 8 for s in range(16)] + [8] * 20,
    "mha_reach": [list(range(9))] * 16 + [[8]] * 20,
    "ffn_reach": [[s] for s in range(36)],
}  # fmt: skip
PROVENANCE = {"source": {"model": "gpt2-large", "sha256": "ab" * 32}, "trained": {"steps": 5000, "tokens": 99}}


def front_matter(card: str) -> dict:
    head, _, _ = card.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head)


def test_a_gpt2_large() -> None:
    card = model_card(CONFIG, PROVENANCE)
    assert front_matter(card)["base_model"] == "gpt2-large"
    assert front_matter(card)["library_name"] == "transformers"
    assert "# gpt2-large as a Mixture of Modules" in card
    assert "trust_remote_code=True" in card
    assert "| steps | 36, attention in 16 of them |" in card
    assert "| KV cache per token, 16 bit | 80.0 KiB |" in card  # 16 steps x 2 x 1280 x 2 bytes
    assert f"SHA-256 {'ab' * 32}" in card
    assert "5000 steps, 99 tokens" in card


def test_numbers_come_from_the_report() -> None:
    report = {"verdict": "parameters 9 -> 4", "perplexity": {"protocol": "block 256"}}
    card = model_card(CONFIG, PROVENANCE, report)
    assert "**parameters 9 -> 4.**" in card
    assert "block 256" in card
    report["perplexity"]["mom_trained"] = {"divergence": 0.31, "agreement": 70.2}
    assert "0.310 nats per token from the source's" in model_card(CONFIG, PROVENANCE, report)


def test_the_machine_that_converted_it_is_not_told() -> None:
    for path in ("/home/anna/models/large", "C:\\anna\\large", "./anna/models/large/"):
        card = model_card(CONFIG, {"source": {"model": path, "sha256": "00"}})
        assert "anna" not in card
        assert "base_model" not in front_matter(card)
        assert "# large as a Mixture of Modules" in card


def test_nothing_known_of_the_source() -> None:
    for provenance in ({}, {"source": None}, {"source": "gpt2"}, {"source": {"model": 7}}, {"trained": [1]}):
        card = model_card(CONFIG, provenance)
        assert "# A GPT-2 as a Mixture of Modules" in card
        assert "Source: unknown." in card


def test_a_hostile_name_stays_text() -> None:
    name = 'x"\nlicense: mit\n---\n<script>alert(1)</script> | [a](b) ![i](http://x) `c` *d*'
    card = model_card(CONFIG, {"source": {"model": name, "sha256": "<b>"}, "trained": {"steps": "<i>", "tokens": "|"}})
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    body = card.split("\n---\n", 1)[1]
    assert not re.search(r"<(script|b|i)>|(?<!\\)\[a|(?<!\\)`c|(?<!\\)\*d", body)


def plain(provenance: dict, report: dict | None = None) -> str:
    """The card of a small MoM, two attentions and two feed-forwards, as a GPT-2."""
    shape = {
        "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_mha_modules": 2,
        "num_ffn_modules": 2, "num_steps": 2, "mha_reach": [[0], [1]], "ffn_reach": [[0], [1]],
    }  # fmt: skip
    config = MomConfig(**shape)
    layers = pack(fixed_halves(config))
    return gpt2_card(Written(config, gpt2_config(config, len(layers)), layers), provenance, report)


def test_a_plain_gpt2_takes_the_quality_and_not_the_costs_of_the_report() -> None:
    perplexity = {"source": {"perplexity": 19.58}, "mom_start": {"perplexity": 27.3}, "mom_trained": None}
    perplexity["protocol"] = "block 256"
    report = {"verdict": "parameters 9 -> 4", "perplexity": perplexity}
    assert "**Perplexity 19.58 -> 27.30**: block 256." in plain(PROVENANCE, report)
    perplexity["mom_trained"] = {"perplexity": 20.25, "divergence": 0.2024, "agreement": 73.6}
    card = plain(PROVENANCE, report)
    assert "0.202 nats per token from the source's; both expect the same token 74% of the time." in card
    assert "19.58 -> 20.25**" in card
    assert "9 -> 4" not in card
    assert "Perplexity" not in plain(PROVENANCE)
    assert front_matter(card)["base_model"] == "gpt2-large"
    assert front_matter(card)["tags"] == ["momify", "gpt2"]


def test_a_hostile_name_stays_text_in_the_card_of_a_plain_gpt2_too() -> None:
    card = plain({"source": {"model": 'x"\n---\n<script>alert(1)</script> | `c`', "sha256": "<b>"}, "plan": [1]})
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    assert not re.search(r"<(script|b)>|(?<!\\)`c", card.split("\n---\n", 1)[1])
