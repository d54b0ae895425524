"""evaluate/run.py and results.py: written as it comes, used again for the same key alone, gone on with after a kill."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from momify.errors import MomifyError
from momify.evaluate.contestant import Contestant
from momify.evaluate.heads import is_kept, keep_head, note_score
from momify.evaluate.results import Entry, Results, Score, read_results
from momify.evaluate.run import Place, evaluate, results_file
from momify.evaluate.task import Baseline, Turn


@dataclass
class Counting:
    """A task that gives the weights' hash plus the seed, and remembers whom it scored; may be killed."""

    name: str = "count"
    main: str = "value"
    shown: tuple[str, ...] = ("value",)
    seeded: bool = True
    higher_is_better: bool = True
    limited: bool = False
    setting: int = 0
    dies_at: int = 99
    refuses: str = ""
    writes: bool = False
    scored: list[tuple[str, int]] = field(default_factory=list)
    kept: list[Path | None] = field(default_factory=list)

    def check_fit(self, one: Contestant) -> None:
        if one.role == self.refuses:
            raise MomifyError("it is too short; take another")

    def key(self, one: Contestant) -> dict:
        return {"sha256": one.sha256, "setting": self.setting}

    def work(self, one: Contestant) -> int:
        return 2

    def incomparable(self, first: Contestant, other: Contestant) -> None:
        return None

    def baselines(self) -> list[Baseline]:
        return []

    def score(self, one: Contestant, turn: Turn) -> Score:
        if len(self.scored) == self.dies_at:
            raise KeyboardInterrupt
        turn.tick(1)
        turn.tick(1)
        self.scored.append((one.role, turn.seed))
        self.kept.append(turn.keep)
        if turn.keep and self.writes:
            turn.keep.mkdir(parents=True, exist_ok=True)
            (turn.keep / "config.json").write_text(str(self.setting))
            (turn.keep / "momify_score.json").unlink(missing_ok=True)  # a head is replaced as a whole
        return Score({"value": int(one.sha256) + turn.seed / 10}, f"setting {self.setting}")


def players(tokenizer: object, *roles: str) -> list[Contestant]:
    return [Contestant(role, str(number), lambda: None, tokenizer) for number, role in enumerate(roles, 1)]


def test_each_seed_of_each_contestant_once(tmp_path: Path, tokenizer: object) -> None:
    task, said, seen = Counting(), [], []
    place = Place(tmp_path, say=said.append, watch=lambda done, total, doing: seen.append((done, total, doing)))
    (found,) = evaluate([task], players(tokenizer, "source", "mom"), [0, 7], place)
    assert task.scored == [("source", 0), ("mom", 0), ("source", 7), ("mom", 7)]
    assert {role: [s.metrics["value"] for s in scores] for role, scores in found.scores.items()} == {
        "source": [1.0, 1.7], "mom": [2.0, 2.7]}  # fmt: skip
    assert found.seeds == (0, 7)
    assert [line.split(":")[0] for line in said] == ["count, source, seed 0", "count, mom, seed 0",
                                                     "count, source, seed 7", "count, mom, seed 7"]  # fmt: skip
    assert seen[-1] == (8, 8, "count, mom, seed 7")
    assert task.kept == [None] * 4


def test_a_task_without_randomness_is_scored_once(tmp_path: Path, tokenizer: object) -> None:
    task = Counting(seeded=False)
    (found,) = evaluate([task], players(tokenizer, "mom"), [0, 1, 2], Place(tmp_path))
    assert task.scored == [("mom", 0)]
    assert found.seeds == (None,)


def test_a_killed_evaluation_goes_on_with_the_next(tmp_path: Path, tokenizer: object) -> None:
    two = players(tokenizer, "source", "mom")
    with pytest.raises(KeyboardInterrupt):
        evaluate([Counting(dies_at=3)], two, [0, 7], Place(tmp_path))
    assert len(json.loads((tmp_path / "count.json").read_text())["entries"]) == 3
    again = Counting()
    (found,) = evaluate([again], two, [0, 7], Place(tmp_path))
    assert again.scored == [("mom", 7)]
    assert [s.metrics["value"] for s in found.scores["mom"]] == [2.0, 2.7]


def test_kept_scores_are_used_for_the_same_key_alone(tmp_path: Path, tokenizer: object) -> None:
    one = players(tokenizer, "mom")
    for setting, times in ((0, 1), (0, 0), (1, 1), (0, 0)):  # a quick look does not cost the whole
        task = Counting(setting=setting)
        (found,) = evaluate([task], one, [0], Place(tmp_path))
        assert len(task.scored) == times
        assert found.scores["mom"][0].protocol == f"setting {setting}"
    other = Counting()
    evaluate([other], [Contestant("mom", "9", lambda: None, tokenizer)], [0], Place(tmp_path))
    assert len(other.scored) == 1


def test_the_same_weights_under_another_name_are_not_scored_again(tmp_path: Path, tokenizer: object) -> None:
    task = Counting()
    twins = [Contestant(role, "5", lambda: None, tokenizer) for role in ("source", "mom")]
    (found,) = evaluate([task], twins, [0], Place(tmp_path))
    assert task.scored == [("source", 0)]
    assert found.scores["source"] == found.scores["mom"]
    assert [entry.role for entry in read_results(tmp_path / "count.json")] == ["source", "mom"]


def test_heads_have_a_place_of_their_own(tmp_path: Path, tokenizer: object) -> None:
    task = Counting()
    evaluate([task], players(tokenizer, "mom"), [3], Place(tmp_path, keep_heads=True))
    assert task.kept == [tmp_path / "heads" / "count" / "mom-seed3"]


def test_heads_of_models_named_by_a_path_stay_in_the_folder(tmp_path: Path, tokenizer: object) -> None:
    task = Counting()
    evaluate([task], players(tokenizer, "/tmp/x", "../y"), [3], Place(tmp_path, keep_heads=True))
    assert [path.name for path in task.kept] == ["-tmp-x-seed3", "..-y-seed3"]
    assert {path.parent for path in task.kept} == {tmp_path / "heads" / "count"}


def test_a_head_without_a_score_is_nobodys(tmp_path: Path, tokenizer: object, make_gpt2: Callable) -> None:
    """Killed between the two: the next evaluation trains it again."""
    key = {"sha256": "1"}
    keep_head(tmp_path / "head", make_gpt2(), tokenizer)
    assert not is_kept(tmp_path / "head", key)
    note_score(tmp_path / "head", key)
    assert is_kept(tmp_path / "head", key)
    assert not is_kept(tmp_path / "head", {"sha256": "2"})


def test_a_task_that_learns_nothing_has_no_head(tmp_path: Path, tokenizer: object) -> None:
    for times in (1, 0):
        task = Counting(seeded=False)
        evaluate([task], players(tokenizer, "mom"), [3], Place(tmp_path, keep_heads=True))
        assert task.kept == [None] * times


def test_a_kept_score_whose_head_is_missing_is_trained_again(tmp_path: Path, tokenizer: object) -> None:
    one, said = players(tokenizer, "mom"), []

    def scored(keep_heads: bool, setting: int = 0) -> int:
        task = Counting(writes=True, setting=setting)
        evaluate([task], one, [3], Place(tmp_path, keep_heads, said.append))
        return len(task.scored)

    assert scored(keep_heads=False) == 1
    assert "again" not in "".join(said)
    assert scored(keep_heads=True) == 1
    assert said[1] == "count, mom, seed 3: the score is kept, but not the fine-tuned model; it is trained again"
    assert scored(keep_heads=True) == scored(keep_heads=False) == 0
    assert scored(keep_heads=True, setting=1) == 1
    head = tmp_path / "heads" / "count" / "mom-seed3"
    assert scored(keep_heads=True) == 1, "what lies there was learned by another setting"
    assert (head / "config.json").read_text() == "0"
    (head / "momify_score.json").unlink()  # kept before there were notes
    assert scored(keep_heads=True) == 0


def test_every_task_looks_at_every_contestant_before_anything_is_scored(tmp_path: Path, tokenizer: object) -> None:
    two, tasks = players(tokenizer, "source", "mom"), [Counting(), Counting(name="other", refuses="mom")]
    with pytest.raises(MomifyError, match=r"^mom: it is too short; take another$"):
        evaluate(tasks, two, [0], Place(tmp_path))
    assert tasks[0].scored == tasks[1].scored == []
    assert not list(tmp_path.iterdir())


def test_results_of_a_task_with_a_path_in_its_name_stay_in_the_folder(tmp_path: Path) -> None:
    assert results_file(tmp_path, "lm_eval:../../x y") == tmp_path / "lm_eval-..-..-x-y.json"


SEED_IS_TEXT = {"role": "a", "seed": "0", "key": {}, "score": {"metrics": {"a": 1}, "protocol": ""}}
METRIC_IS_TRUE = {"role": "a", "seed": 0, "key": {}, "score": {"metrics": {"a": True}, "protocol": ""}}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"entries": 3}',
        '{"entries": [{}]}',
        "not json",
        json.dumps({"entries": [SEED_IS_TEXT]}),
        json.dumps({"entries": [METRIC_IS_TRUE]}),
    ],
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "rte.json").write_text(text)
    with pytest.raises(MomifyError, match=r"rte\.json (is not a result file|cannot be read)"):
        Results(tmp_path / "rte.json", "rte")


def test_two_processes_with_other_seeds_lose_nothing(tmp_path: Path) -> None:
    one, two = (Results(tmp_path / "a.json", "a") for _ in range(2))
    for results, seed in ((one, 0), (two, 1), (one, 2)):
        results.add(Entry("mom", seed, {"sha256": "1"}, Score({"value": 1.0}, "")))
    assert [entry.seed for entry in read_results(tmp_path / "a.json")] == [0, 1, 2]


def test_looking_for_a_score_writes_nothing(tmp_path: Path) -> None:
    results = Results(tmp_path / "a.json", "a")
    results.add(Entry("source", 0, {"sha256": "1"}, Score({"value": 1.0}, "")))
    assert results.find(0, {"sha256": "1"}).metrics == {"value": 1.0}
    assert [entry.role for entry in read_results(tmp_path / "a.json")] == ["source"]


def test_writers_at_the_same_time_wait_for_each_other(tmp_path: Path) -> None:
    def write(first: int) -> None:
        for seed in range(first, first + 5):
            Results(tmp_path / "a.json", "a").add(Entry("mom", seed, {"sha256": "1"}, Score({"value": 1.0}, "")))

    with ThreadPoolExecutor(4) as pool:  # each opens the folder for itself, as a process does
        list(pool.map(write, range(0, 20, 5)))
    assert sorted(entry.seed for entry in read_results(tmp_path / "a.json")) == list(range(20))
