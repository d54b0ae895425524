"""Scoring a subject beside its source and others: who takes part, in which tasks, and what is kept of it."""

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from momify.convert.weight_files import find_weight_files
from momify.data.blocks import load_tokens
from momify.data.tokenizer import load_tokenizer
from momify.errors import MomifyError
from momify.evaluate import run
from momify.evaluate.compare import average, summary, weights
from momify.evaluate.contestant import Contestant
from momify.evaluate.glue_tasks import GLUE
from momify.evaluate.perplexity import Perplexity
from momify.evaluate.ppl import Ppl, from_score
from momify.evaluate.results import read_results
from momify.evaluate.tasks import make_tasks
from momify.files import read_json, sha256_of_files, write_json
from momify.models import check_own_source, load_model, locate
from momify.recipe_blocks import EvalBlock
from momify.report.tasks import comparison_table, protocol_lines
from momify.screen import Screen
from momify.subject import Subject

Json = dict[str, Any]
SUMMARIES = "scores.json"


@dataclass(frozen=True)
class EvalOptions:
    """The text and window of `ppl`, and who takes part; None means the run's own.

    limit: windows of a block that are scored at most. roles: which of source, start and mom. also: more models.
    """

    data: list[str] | None = None
    column: str = "text"
    block: int | None = None
    stride: int | None = None
    limit: int | None = None
    baseline: bool = True
    roles: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()
    keep_heads: bool = False


def evaluate(subject: Subject, settings: EvalBlock, options: EvalOptions, screen: Screen) -> list[Json]:
    """Score the subject, its source (`baseline`) and the models of `also` on the tasks of an eval block.

    Gives one summary a task (see evaluate/compare.py), and one of GLUE's average where several of its tasks took part.
    Results are kept in eval/<task>.json as they come.
    """
    options = replace(options, limit=settings.limit, baseline=settings.baseline)
    tasks = make_tasks(settings, lambda: ppl_task(subject, options), screen.say)
    contestants = contestants_of(subject, options, screen)
    tasks = [task.among(contestants) if isinstance(task, Ppl) else task for task in tasks]
    with screen.progress("evaluating") as progress:
        place = run.Place(subject.results / "eval", options.keep_heads, screen.say, progress)
        outcomes = run.evaluate(tasks, contestants, settings.seeds, place)
    found = [summary(outcome) for outcome in outcomes]
    if overall := average([one for one in found if one["task"] in GLUE]):
        found.append(overall)
    keep_summaries(subject.results / "eval" / SUMMARIES, found)
    screen.say(f"wrote {subject.results / 'eval'}")
    return found


def check_tasks_data(settings: EvalBlock) -> None:
    """Raise MomifyError now for what would end an evaluation after hours of training: data that are missing or wrong.

    The hub is not asked.
    """
    fine_tuned = [task for task in settings.tasks if task != "ppl"]
    if fine_tuned and settings.data_dir is not None:
        tasks = settings.model_copy(update={"tasks": fine_tuned})
        make_tasks(tasks, lambda: None, lambda line: None)


def keep_summaries(path: Path, found: list[Json]) -> None:
    """Keep the newest summary of each task and set of models, the newest last, for the report.

    A quick look does not take the place of a whole one.
    """
    kept = {_place(one): one for one in read_summaries(path)}
    for one in found:
        before = kept.get(_place(one))
        if before is None or weights(before) != weights(one) or _may_replace(before, one):
            kept.pop(_place(one), None)
            kept[_place(one)] = one
    write_json(path, {"tasks": list(kept.values())})


def _place(one: Json) -> tuple[str, frozenset[str]]:
    return one["task"], frozenset(one["models"])


def _may_replace(before: Json, one: Json) -> bool:
    return before["limited"] or not one["limited"]


def kept_summaries(subject: Subject, screen: Screen) -> list[Json]:
    """What was kept of tasks (but for ppl, which a report measures itself) with the very weights of today."""
    now = {role: contestant(role, subject, screen).sha256 for role in ("source", "mom")}
    kept = read_summaries(subject.results / "eval" / SUMMARIES)
    return newest([one for one in kept if one["task"] != "ppl" and now.items() <= weights(one).items()])


def newest(kept: list[Json]) -> list[Json]:
    """One summary a task, the last whole one if there is any; an average only if it is that of the tasks given."""
    found: dict[str, Json] = {}
    for one in kept:
        if one["task"] not in found or _may_replace(found[one["task"]], one):
            found[one["task"]] = one
    covered = {name: [found[task] for task in one["covers"] or () if task in found] for name, one in found.items()}
    return [one for name, one in found.items() if not one["covers"] or average(covered[name]) == one]


def read_summaries(path: Path) -> list[Json]:
    """Kept summaries, none where there are none. Raises MomifyError for what momify did not write."""
    if not path.exists():
        return []
    try:
        tasks = read_json(path)["tasks"]
        for one in tasks:
            _ = one["limited"], one["covers"], average([one, one])
        comparison_table(tasks)
        protocol_lines(tasks)
        return tasks
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError):
        raise MomifyError(
            f"{path} is not what momify eval keeps for the report; remove it and evaluate again"
        ) from None


def evaluate_ppl(subject: Subject, options: EvalOptions, screen: Screen) -> dict[str, Perplexity]:
    """Held-out perplexity of the subject and (`baseline`) its source, by one protocol; kept in eval/ppl.json."""
    task, contestants = ppl_task(subject, options), contestants_of(subject, options, screen)
    with screen.progress("scoring held-out text") as progress:
        place = run.Place(subject.results / "eval", watch=lambda done, total, doing: progress(done, total))
        (outcome,) = run.evaluate([task.among(contestants)], contestants, [0], place)
    return {role: from_score(scores[0]) for role, scores in outcome.scores.items()}


def ppl_task(subject: Subject, options: EvalOptions) -> Ppl:
    """The task `ppl` on a subject's held-out text. Raises MomifyError for a window that cannot be."""
    data = subject.data(options.data, options.column)
    block = options.block or data.block_length
    task = Ppl(
        cache(lambda tokenizer: load_tokens(data, tokenizer, needs="valid")),
        block,
        options.stride or block,
        options.limit,
    )
    task.check()
    return task


def contestants_of(subject: Subject, options: EvalOptions, screen: Screen) -> list[Contestant]:
    """Who is scored: the source first, then the subject, then the others. Raises MomifyError for a name twice."""
    beside = ("source", "mom") if options.baseline else ("mom",)
    roles = options.roles or (beside if subject.kind == "mom" else ("dense",))
    found = [contestant(role, subject, screen) for role in roles]
    for name in options.also:
        if name in [one.role for one in found]:
            raise MomifyError(f"--also {name}: a model of that name takes part already; name another")
        found.append(_contestant(name, locate(name, say=screen.say)))
    return found


def contestant(role: str, subject: Subject, screen: Screen) -> Contestant:
    """The model that plays `role`: source (the dense one), else the subject itself.

    Raises MomifyError for a source that is not the one that the subject was made from.
    """
    if role != "source":
        return _contestant(role, subject.folder)
    found = _contestant(role, folder := subject.source(screen))
    check_own_source(folder, found.sha256, subject.folder)
    return found


def _contestant(role: str, folder: Path) -> Contestant:
    digest = sha256_of_files(sorted([folder / "config.json", *find_weight_files(folder)]))
    return Contestant(role, digest, lambda: load_model(folder), load_tokenizer(folder))


def kept_start(subject: Subject, options: EvalOptions, protocol: str) -> dict[str, Perplexity]:
    """The perplexity of the MoM as converted, measured before it was trained; none where text or protocol differ."""
    text = ppl_task(subject, options).text(load_tokenizer(subject.folder)).sha256
    kept = read_results(run.results_file(subject.results / "eval", "ppl"))
    starts = [entry for entry in kept if entry.role == "start" and entry.key.get("data") == text]
    found = [entry for entry in starts if _unsized(entry.score.protocol) == _unsized(protocol)]
    return {"start": replace(from_score(found[-1].score), protocol=protocol)} if found else {}


def _unsized(protocol: str) -> str:
    """A protocol without its bytes, which older versions did not tell; the text's hash says more."""
    return re.sub(r" of [\d,]+ bytes", "", protocol)
