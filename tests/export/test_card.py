"""The model card: what the hub reads, what a reader reads, and that a hostile name stays text."""

import re

import yaml

from momify.export.card import model_card

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
    assert "**parameters 9 -&gt; 4.**" in card
    assert "block 256" in card


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
