"""`momify eval` end to end on tiny models and files: who takes part, what is shown, what is kept, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from momify.data.tokenizer import train_tokenizer
from momify.evaluate.compare import average
from momify.evaluation import keep_summaries, newest, read_summaries

TEXTS = [f"the cat {i} sat on the mat, the hat and the rat {'so ' * (i % 7)}\n" * 6 for i in range(60)]
HEAD = "index\tsentence1\tsentence2\tlabel\n"
FAST = ("--set", "epochs=1", "--set", "max_length=32", "--set", "learning_rate=1e-3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny source, a run made from it, and data."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 280)
    sizes = {"vocab_size": 280, "n_positions": 80, "n_embd": 32, "n_layer": 3, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "src")
    tokenizer.save_pretrained(folder / "src")
    (folder / "text.txt").write_text("<|endoftext|>\n".join(TEXTS))
    for task, label in (("RTE", ("entailment", "not_entailment")), ("WNLI", ("0", "1")), ("CoLA", None)):
        place = folder / "data" / "glue" / task
        place.mkdir(parents=True)
        for name, count in (("train", 20), ("dev", 10)):
            rows = [
                f"{i}\tthe cat {i}\tthe hat\t{label[i % 2]}" if label else f"x\t{i % 2}\t\tthe cat {i}"
                for i in range(count)
            ]
            (place / f"{name}.tsv").write_text((HEAD if label else "") + "\n".join(rows) + "\n")
    (folder / "data" / "xsum").mkdir()
    for name, count in (("train", 8), ("test", 4)):
        rows = [json.dumps({"document": f"the cat {i} sat on the mat", "summary": f"cat {i}"}) for i in range(count)]
        (folder / "data" / "xsum" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "w"


Momify = Callable[..., tuple[int, str, str]]


def test_a_run_beside_its_source_on_everything(there: Path, momify: Momify) -> None:
    assert momify("convert", "src", "--mha", 2, "--ffn", 2, "--calibration", "text.txt", "--name", "c")[0] == 0
    command = ("eval", "c", "--tasks", "glue,xsum,ppl", "--data-dir", "data", "--seeds", "0,1", "--keep-heads", *FAST,
               "--set", "max_length=null")  # fmt: skip
    code, out, err = momify(*command)
    assert (code, err) == (0, ""), err
    assert "glue without sst2, mrpc, stsb, qqp, mnli, qnli (" in out
    words = ["source", "mom", "difference", "spread", "majority", "random", "rouge1", "bits_per_byte", "lead"]
    words += ["glue average: the mean of the main metrics of cola, rte", "2 standard errors", "seeds 0, 1"]
    assert [word for word in words if word not in out] == []
    kept = {path.name for path in (there / "runs/c/eval").iterdir()}
    assert kept == {"cola.json", "rte.json", "wnli.json", "xsum.json", "ppl.json", "scores.json", "heads"}
    assert len(json.loads((there / "runs/c/eval/rte.json").read_text())["entries"]) == 4
    GPT2ForSequenceClassification.from_pretrained(there / "runs/c/eval/heads/rte/source-seed1")
    code, out, _ = momify(*command, "--json")
    found = json.loads(out)
    assert list(found) == ["cola", "rte", "wnli", "xsum", "ppl", "glue"]
    assert set(found["rte"]["models"]) == {"source", "mom"}
    assert found["rte"]["models"]["mom"]["seconds"] == sum(
        entry["score"]["seconds"] for entry in json.loads((there / "runs/c/eval/rte.json").read_text())["entries"]
        if entry["role"] == "mom")  # fmt: skip  # nothing was scored again
    assert found["glue"]["covers"] == ["cola", "rte"]
    assert found["ppl"]["models"]["mom"]["metrics"]["divergence"]["mean"] > 0
    assert "divergence" not in found["ppl"]["models"]["source"]["metrics"]
    assert "agreement" in out


def test_dense_folders_and_others_by_name(there: Path, momify: Momify) -> None:
    shutil.copytree("src", "other")
    command = ("eval", "src", "--tasks", "wnli", "--data-dir", "data", "--also", "other", "--limit", 5)
    code, out, _ = momify(*command, *FAST, "--json")
    found = json.loads(out)["wnli"]
    assert (code, list(found["models"])) == (0, ["dense", "other"])
    assert found["limited"]
    assert found["differences"]["other"]["accuracy"]["difference"] == 0.0  # the same weights and seed
    assert found["differences"]["other"]["accuracy"]["verdict"] == "one seed, spread unknown"
    assert "5 of 10 (limited) examples; trained on 5 of 20 (limited)" in found["models"]["dense"]["protocol"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks", "rtee"), "unknown task 'rtee'; did you mean 'rte'?"),
        (("--tasks", ","), "no task is named"),
        (("--tasks", "rte", "--data-dir", "nowhere"), "data folder nowhere does not exist"),
        (("--tasks", "sst2", "--data-dir", "data"), "SST-2/train.tsv does not exist"),
        (("--seeds", "0,x"), "seeds.1"),
        (("--seeds", "1,1"), "name one twice"),
        (("--set", "epoch=3"), "did you mean 'epochs'"),
        (("--set", "epochs"), "is not of the form"),
        (("--tasks", "xsum", "--data-dir", "data", "--set", "max_length=40"), "raise eval.max_length"),
        (("--tasks", "wnli", "--data-dir", "data", "--also", "dense"), "a model of that name takes part already"),
        (("--tasks", "wnli", "--data-dir", "data", "--also", "no/where/else"), "no/where/else does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str, there: Path, momify: Momify) -> None:
    code, _, err = momify("eval", "src", *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "max_length=40"), "dense: xsum needs 60 positions"),
        (("--also", "short"), "short: xsum needs 60 positions"),
        (("--tasks", "rte,ppl", "--data", "text.txt", "--also", "short"), "short: block 80 is longer"),
    ],
)
def test_what_is_too_short_for_one_task_is_told_before_another_is_scored(
    arguments: tuple[str, ...], said: str, there: Path, momify: Momify
) -> None:
    sizes = {"vocab_size": 280, "n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(there / "short")
    for path in (there / "src").glob("tokenizer*"):
        shutil.copy(path, there / "short")
    code, _, err = momify("eval", "src", "--tasks", "rte,xsum", "--data-dir", "data", *FAST[:2], *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err
    assert not list(there.rglob("rte.json"))


def test_heads_are_trained_again_where_only_scores_were_kept(there: Path, momify: Momify) -> None:
    command = ("eval", "src", "--tasks", "wnli", "--data-dir", "data", *FAST)
    assert momify(*command)[0] == 0
    code, out, _ = momify(*command, "--keep-heads")
    assert (code, out.count("it is trained again")) == (0, 1)
    (head,) = there.rglob("wnli/dense-seed0")
    GPT2ForSequenceClassification.from_pretrained(head)
    code, out, _ = momify(*command, "--keep-heads")
    assert (code, out.count("it is trained again")) == (0, 0)


def test_run_scores_the_tasks_of_its_recipe_and_checks_their_data_first(there: Path, momify: Momify) -> None:
    recipe = """
run: {name: all}
source: {model: src}
mom: {mha: 2, ffn: 2, calibration_blocks: 2}
data: {train: text.txt, block_length: 32}
train: {steps: 2, batch_size: 2, precision: fp32}
eval: {tasks: [ppl, rte], data_dir: data, seeds: [0, 1], epochs: 1, limit: 8}
"""
    (there / "all.yaml").write_text(recipe)
    code, _, err = momify("run", "all.yaml", "eval.tasks=[mrpc]")
    assert (code, err.count("\n")) == (2, 1)
    assert "MRPC/train.tsv does not exist" in err
    assert not (there / "runs").exists()
    assert momify("run", "all.yaml")[0] == 0
    report = json.loads((there / "runs/all/report.json").read_text())
    (rte,) = report["tasks"]
    assert (rte["task"], list(rte["models"]), rte["limited"]) == ("rte", ["source", "mom"], True)
    assert "| rte (limited) | accuracy |" in (there / "runs/all/report.md").read_text()
    assert "rte (limited)" in (there / "runs/all/report.html").read_text()


def kept(task: str, *roles: str, score: float = 50.0, limited: bool = False, sha256: str = "1") -> dict:
    """A summary as `momify eval` keeps it."""
    spread = {"mean": score, "deviation": None, "values": [score]}
    models = {role: {"metrics": {"accuracy": spread}, "sha256": sha256, "protocol": "dev", "notes": [], "seconds": 1.0}
              for role in roles}  # fmt: skip
    return {"task": task, "main": "accuracy", "shown": ["accuracy"], "higher_is_better": True, "limited": limited,
            "seeds": [0], "covers": None, "models": models, "differences": {}, "baselines": []}  # fmt: skip


BOTH = ("source", "mom")


def test_a_quick_look_or_one_of_fewer_models_takes_no_whole_scores_place(tmp_path: Path) -> None:
    path, sst2, rte = tmp_path / "scores.json", kept("sst2", *BOTH), kept("rte", *BOTH)
    keep_summaries(path, [sst2, rte, average([sst2, rte])])
    for look in (kept("sst2", "mom", limited=True), kept("sst2", *BOTH, limited=True), kept("sst2", "mom")):
        keep_summaries(path, [look])
    shown = newest([one for one in read_summaries(path) if len(one["models"]) == 2])
    assert shown == [sst2, rte, average([sst2, rte])]
    alone = [one for one in read_summaries(path) if len(one["models"]) == 1]
    assert alone == [kept("sst2", "mom")]


def test_what_is_whole_or_of_other_weights_replaces_and_the_average_is_of_what_is_shown(tmp_path: Path) -> None:
    path, quick = tmp_path / "scores.json", [kept(name, *BOTH, limited=True) for name in ("sst2", "rte")]
    keep_summaries(path, [*quick, average(quick)])
    sst2 = kept("sst2", *BOTH, score=60.0)
    keep_summaries(path, [sst2])
    assert newest(read_summaries(path)) == [quick[1], sst2], "the average is of an earlier sst2"
    trained = kept("sst2", *BOTH, sha256="2", limited=True)
    keep_summaries(path, [trained])
    assert newest(read_summaries(path))[-1] == trained
    beside = kept("rte", *BOTH, "gpt2")
    keep_summaries(path, [beside])
    assert newest([*quick, beside]) == [quick[0], beside]
    assert newest([beside, quick[1]]) == [beside], "whole, though older"


def test_a_limit_above_the_text_is_no_limit(there: Path, momify: Momify) -> None:
    command = ("eval", "src", "--tasks", "ppl", "--data", "text.txt", "--json")
    whole = json.loads(momify(*command)[1])["ppl"]
    assert json.loads(momify(*command, "--limit", 100_000)[1])["ppl"] == whole
    assert not whole["limited"]
