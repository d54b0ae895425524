"""evaluate/lm_eval.py: a task file of our own, offline, against likelihoods worked out with the model itself."""

import json
import sys
from pathlib import Path

import pytest
import torch

from momify.errors import MomifyError
from momify.evaluate.contestant import Contestant
from momify.evaluate.lm_eval import LmEval
from momify.evaluate.task import Turn

TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a task of 14 questions."""
    pytest.importorskip("lm_eval", reason="needs the extra momify[lm-eval]")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    own = tmp_path / "lm_eval"
    own.mkdir()
    rows = [{"question": f"the cat sat on {'the ' * (i % 5)}mat {i}?", "answer": i % 2} for i in range(14)]
    (own / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (own / "toy.yaml").write_text(TASK.format(path=own / "toy.jsonl"))
    return tmp_path


def likelihood(one: Contestant, model: torch.nn.Module, text: str, answer: str) -> float:
    before, after = (one.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer))
    logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return logits[range(len(after)), after].sum().item()


@pytest.mark.parametrize("which", ["dense", "mom"])
def test_the_score_is_the_share_of_likelier_answers(which: str, folder: Path, request: pytest.FixtureRequest) -> None:
    one = request.getfixturevalue(which)
    model, right, wanted = one.load(), 0, 0
    with torch.no_grad():
        for line in (folder / "lm_eval" / "toy.jsonl").read_text().splitlines():
            row = json.loads(line)
            yes, no = (likelihood(one, model, row["question"], answer) for answer in (" yes", " no"))
            right += int(no > yes) == row["answer"]
            wanted += 1
    task = LmEval("toy_choice", folder=folder)
    score = task.score(one, Turn(0))
    assert (task.name, task.main, task.shown, task.higher_is_better) == ("lm_eval:toy_choice", "acc", ("acc",), True)
    assert score.metrics == {"acc": pytest.approx(right / wanted)}
    assert "14 examples, 0-shot, not fine-tuned" in score.protocol


def test_a_limit_is_marked_and_part_of_the_key(folder: Path, dense: Contestant) -> None:
    some, whole = LmEval("toy_choice", 5, folder), LmEval("toy_choice", None, folder)
    assert "5 of 14 (limited) examples" in some.score(dense, Turn(0)).protocol
    assert some.limited
    assert some.key(dense) != whole.key(dense)
    generous = LmEval("toy_choice", 14, folder)
    assert (generous.limited, generous.key(dense)) == (False, whole.key(dense))


@pytest.mark.slow  # lm-eval indexes its thousands of tasks
def test_an_unknown_task(folder: Path) -> None:
    with pytest.raises(MomifyError, match="lm-eval knows no task 'no_such_task'"):
        LmEval("no_such_task", folder=folder)


def test_data_that_are_not_there(folder: Path) -> None:
    (folder / "lm_eval" / "toy.jsonl").unlink()
    with pytest.raises(MomifyError, match=r"lm_eval:toy_choice could not be loaded \("):
        LmEval("toy_choice", folder=folder)


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(
        MomifyError, match=r"^lm_eval:piqa needs EleutherAI's lm-eval.*pip install 'momify\[lm-eval\]'$"
    ):
        LmEval("piqa")
