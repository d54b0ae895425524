"""An exported folder in a Python that cannot see momify: same logits, same tokens, and it saves again."""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from momify.convert.stored_mom import model_class
from momify.errors import MomifyError
from momify.export.mom import code_files, export_mom
from momify.model import MomConfig, MomForCausalLM, MomForSequenceClassification

SETTINGS: dict = {
    "vocab_size": 300, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 96,
    "num_mha_modules": 3, "num_ffn_modules": 4, "num_steps": 4, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0, "mha_homes": [0, 1, 3, 2], "mha_reach": [[0], [0, 1, 2, 3], [0, 1, 3], [2, 3]],
}  # fmt: skip

# Runs with momify made impossible to import: prints nothing, leaves tensors and ids for the test to compare.
FRESH = """
import json, sys
sys.modules["momify"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
try:
    import momify
    raise SystemExit("momify can be imported")
except ImportError:
    pass

def answers(model):
    ids = torch.load(out + "/ids.pt")
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=9, do_sample=False)
    return {"logits": logits, "tokens": tokens}

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
first = answers(model)
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    ids = torch.load(out + "/ids.pt")
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
model.save_pretrained(out + "/again")
second = answers(AutoModelForCausalLM.from_pretrained(out + "/again", trust_remote_code=True))
tokenizer = AutoTokenizer.from_pretrained(folder)
torch.save({"first": first, "second": second, "ids": tokenizer("def f(x):").input_ids}, out + "/found.pt")
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(["def f(x): return x\n"] * 9, vocab_size=300, special_tokens=["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, eos_token="<|endoftext|>")


@pytest.fixture
def model() -> MomForCausalLM:
    return make_model()


def make_model(**changes: object) -> MomForCausalLM:
    made = MomForCausalLM(MomConfig(**{**SETTINGS, **changes})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "wte" not in name and "ln_f" not in name:
                parameter.normal_(std=0.5 if "router" in name else 0.15)
    return made


@pytest.fixture
def folder(model: MomForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A model folder as momify writes it."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    record = {"source": {"model": "gpt2-large", "sha256": "ab" * 32}, "trained": {"steps": 7, "tokens": 70}}
    (tmp_path / "model" / "momify.json").write_text(json.dumps(record))
    return tmp_path / "model"


@pytest.fixture(scope="module")
def run_fresh(forking: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path, Path], None]:
    """Runs a script in a Python that never saw momify, offline, with its own place for remote code."""
    home = tmp_path_factory.mktemp("home")
    python = forking(
        f"os.environ |= {{'HF_HUB_OFFLINE': '1', 'HF_HOME': {str(home)!r}, 'HF_MODULES_CACHE': '{home}/modules'}}\n"
        "sys.modules['momify'] = None\nimport torch\n"
        "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer",
        torch.get_num_threads(),
    )

    def run(script: str, folder: Path, out: Path) -> None:
        done = python.run(script, out, folder, out)
        assert done.code == 0, done.err[-3000:]

    return run


@pytest.mark.parametrize(
    ("changes", "shard"),
    [
        ({}, "5GB"),
        ({"modules_per_token": 2, "tie_word_embeddings": False}, "40KB"),
        ({"skipped_keys": "masked", "router_hidden": 6}, "5GB"),
        ({"patch_rank": 3, "step_rank": 2, "mha_homes": [0, 1, 3, 0], "mha_reach": [[0], [1, 3], [3], [0]]}, "5GB"),
    ],
    ids=["plain", "K=2, untied, sharded", "masked keys, wide routers", "patches and deltas"],
)
def test_a_fresh_python_loads_it_and_says_the_same(
    changes: dict, shard: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, run_fresh: Callable
) -> None:
    model = make_model(**changes)
    model.save_pretrained(tmp_path / "model", max_shard_size=shard)
    tokenizer.save_pretrained(tmp_path / "model")
    ids, out = torch.randint(1, 300, (3, 12)), tmp_path / "out"
    out.mkdir()
    torch.save(ids, out / "ids.pt")
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=9, do_sample=False)

    target = export_mom(tmp_path / "model", tmp_path / "export")
    files = [sorted(p.name for p in place.glob("*.safetensors*")) for place in (tmp_path / "model", target)]
    assert files[0] == files[1]
    assert (len(files[1]) > 2) == (shard != "5GB")
    run_fresh(FRESH, target, out)
    found = torch.load(out / "found.pt")
    for once in (found["first"], found["second"]):
        assert torch.equal(once["logits"], logits)
        assert torch.equal(once["tokens"], tokens)
    assert found["ids"] == tokenizer("def f(x):").input_ids


def test_a_classifier_can_be_exported_and_started_from_it(tmp_path: Path, run_fresh: Callable) -> None:
    classifier = MomForSequenceClassification(MomConfig(**SETTINGS, num_labels=3)).eval()
    classifier.save_pretrained(tmp_path / "model")
    target = export_mom(tmp_path / "model", tmp_path / "export")
    ids, out = torch.randint(1, 300, (2, 12)), tmp_path / "out"
    out.mkdir()
    torch.save(ids, out / "ids.pt")
    script = """
import sys; sys.modules["momify"] = None
import torch
from transformers import AutoModelForSequenceClassification
folder, out = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.load(out + "/ids.pt")).logits, out + "/found.pt")
"""
    run_fresh(script, target, out)
    with torch.no_grad():
        assert torch.equal(torch.load(out / "found.pt"), classifier(ids).logits)


def test_what_lies_in_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "evil.py").write_text("raise SystemExit")
    target = export_mom(folder, tmp_path / "deep" / "export")
    names = {path.name for path in target.iterdir()}
    package = {path.name for path in code_files()}
    assert {"config.py", "modeling.py", "classification.py", "dispatch.py"} <= package
    assert "__init__.py" not in package
    assert names == package | {
        "config.json", "generation_config.json", "model.safetensors", "momify.json", "README.md", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, target))
    assert after.pop("auto_map").keys() == {
        "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
    }  # fmt: skip
    assert after == before
    record = json.loads((target / "momify.json").read_text())
    assert record["source"]["model"] == "gpt2-large"
    assert record["export"]["format"] == "mom"
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["export"]  # no temporary folder is left


def test_code_never_reaches_out_of_its_folder() -> None:
    """An export carries these files alone: any import of momify, or of a package beside torch's, would break it."""
    for path in code_files():
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                root = words[1].split(".")[0]
                tried = root == "triton" and line.startswith("    ")  # inside try ... except ImportError
                assert tried or root in ("", "torch", "transformers") or root in sys.stdlib_module_names, (
                    path.name,
                    line,
                )
            if line.lstrip().startswith("from ."):
                sibling = words[1].removeprefix(".")
                assert (path.parent / f"{sibling}.py").is_file(), (path.name, line)


def test_exporting_again_replaces_the_export(folder: Path, tmp_path: Path) -> None:
    target = export_mom(folder, tmp_path / "export")
    (target / "left over").write_text("x")
    make_model().save_pretrained(folder)
    export_mom(folder, target)
    assert not (target / "left over").exists()
    old, new = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_an_export_can_be_exported(folder: Path, tmp_path: Path) -> None:
    first = export_mom(folder, tmp_path / "first")
    second = export_mom(first, tmp_path / "second")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_targets_that_must_not_be_touched(folder: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for target, words in (
        (full, "something else"),
        (tmp_path, "something else"),  # the parent of the model itself
        (folder, "model folder itself"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(MomifyError, match=words):
            export_mom(folder, target)
    assert (full / "thesis.txt").read_text() == "years of work"
    assert (folder / "model.safetensors").is_file()
    (tmp_path / "empty").mkdir()
    export_mom(folder, tmp_path / "empty")


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_models_that_are_not_whole(folder: Path, tmp_path: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole_weights, whole_config = weights.read_bytes(), config.read_bytes()
    mangled: list[tuple[Callable[[], object], str]] = [
        (lambda: weights.unlink(), "no weights in"),
        (lambda: weights.write_bytes(whole_weights[:-9]), "truncated or damaged"),
        (
            lambda: change_weights(folder, lambda t: t.pop("model.ffn.up.weight")),
            r"lacks tensor model\.ffn\.up\.weight",
        ),
        (lambda: change_weights(folder, lambda t: t.update(extra=torch.ones(1))), "a tensor extra"),
        (lambda: change_weights(folder, lambda t: t.update({"model.ln_f.bias": torch.ones(3)})), r"has shape \(3,\)"),
        (lambda: change_weights(folder, lambda t: t["model.ln_f.bias"].fill_(torch.nan)), r"ln_f\.bias .*not finite"),
        (
            lambda: change_weights(folder, lambda t: t.update({"model.ln_f.bias": torch.ones(32, dtype=torch.int8)})),
            r"ln_f\.bias is torch\.int8",
        ),
        (lambda: config.unlink(), r"config\.json"),
        (lambda: config.write_text("{"), "not JSON"),
        (lambda: config.write_text('{"model_type": "gpt2"}'), "type 'gpt2'"),
        (lambda: config.write_text('{"model_type": "mom", "num_steps": 0}'), "num_steps is 0"),
        (lambda: config.write_text('{"model_type": "mom", "num_steps": "many"}'), "no MoM that can be built"),
    ]
    for mangle, words in mangled:
        mangle()
        with pytest.raises(MomifyError, match=words):
            export_mom(folder, tmp_path / "export")
        assert not (tmp_path / "export").exists()
        weights.write_bytes(whole_weights)
        config.write_bytes(whole_config)
    with pytest.raises(MomifyError, match="does not exist"):
        export_mom(tmp_path / "nowhere", tmp_path / "export")
    export_mom(folder, tmp_path / "export")


CONFIGS = {
    "400 digits": ({"hidden_size": 10**400}, r"hidden_size is 10{19}, larger than any model's"),
    "400 digits nowhere known": ({"strange": 10**400}, r"strange is 10{19}, larger than any model's"),
    "labels of no number": ({"id2label": {"a": "b"}}, "no MoM that can be built: .*'a'"),
    "no number of labels": ({"num_labels": "x"}, "no MoM that can be built"),
    "unknown type": ({"dtype": "foo"}, "no MoM that can be built: .*foo"),
}


@pytest.mark.parametrize(("changes", "words"), CONFIGS.values(), ids=CONFIGS)
def test_damaged_configs_are_refused_in_one_line(changes: dict, words: str, folder: Path, tmp_path: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(MomifyError, match=words) as told:
        export_mom(folder, tmp_path / "export")
    assert len(str(told.value)) < 400
    assert "\n" not in str(told.value)
    path.write_text(json.dumps({**json.loads(path.read_text()), **dict.fromkeys(changes), "architectures": 5}))
    assert model_class(json.loads(path.read_text())) is MomForCausalLM


def test_a_classifier_is_checked_and_told_of_as_one(tmp_path: Path) -> None:
    static = {"mha_reach": [[s % 3] for s in range(4)], "ffn_reach": [[s] for s in range(4)], "mha_homes": None}
    folder, said = tmp_path / "model", []
    MomForSequenceClassification(MomConfig(**{**SETTINGS, **static}, num_labels=3)).save_pretrained(folder)
    target = export_mom(folder, tmp_path / "export", say=said.append)
    card = (target / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "generate" not in card
    assert not any("gpt2" in line for line in said)
    for words, change in (
        (r"score\.weight has shape \(2, 32\), not \(3, 32\)", {"score.weight": torch.zeros(2, 32)}),
        (r"score\.weight has values that are not finite", {"score.weight": torch.full((3, 32), torch.nan)}),
    ):
        change_weights(folder, lambda t, change=change: t.update(change))
        with pytest.raises(MomifyError, match=words):
            export_mom(folder, target)


def test_a_full_disk_leaves_the_earlier_export(folder: Path, tmp_path: Path) -> None:
    target = export_mom(folder, tmp_path / "export")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, allowed[1]))
    try:
        with pytest.raises(MomifyError, match=r"^cannot write .*/export: File too large; .*before is intact$"):
            export_mom(folder, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_dense_model_is_refused(tmp_path: Path, make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    make_gpt2().save_pretrained(tmp_path / "dense")
    with pytest.raises(MomifyError, match="'gpt2'"):
        export_mom(tmp_path / "dense", tmp_path / "export")
