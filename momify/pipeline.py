"""A run, step by step: the table of contents. Each function is one verb; its chapter is the folder of that name."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from momify.conversion import convert, request_of, source_folder, tokens_of
from momify.convert.assemble import assemble, network_of
from momify.convert.homes import Alike, Request, check_request, choose_homes
from momify.convert.source import Source, read_config
from momify.data.blocks import TokenData, load_tokens
from momify.data.documents import Corpus, read_corpus
from momify.data.tokenizer import check_same_tokens, load_tokenizer, train_tokenizer
from momify.devices import best_device
from momify.errors import MomifyError
from momify.evaluation import EvalOptions, contestant, evaluate, evaluate_ppl, kept_start, kept_summaries
from momify.export.gpt2 import export_gpt2
from momify.export.mom import export_mom
from momify.files import whole_folder, write_text
from momify.measure.paths import Paths, leave_one_out, trace_paths
from momify.model import MomForCausalLM
from momify.models import (
    load_dense,
    load_model,
    load_mom,
    load_teacher,
    locate,
    open_own_source,
    read_provenance,
    step_layers,
    write_model,
)
from momify.processes import count, first_then_others, is_first
from momify.recipe import Recipe
from momify.recipe_blocks import MomBlock, Scratch, TrainBlock
from momify.report.data import SCHEMA_VERSION, Looks
from momify.report.make import (
    Pair,
    command_line,
    measure_pair,
    quality_of,
    read_report,
    text_of,
    write_report,
)
from momify.report.provenance import Origin, versions
from momify.report.routes import Traced, render_routes
from momify.report.training import read_training
from momify.runs import Run, settle
from momify.screen import Screen
from momify.subject import Subject
from momify.train.fit import Place, Stopped, fit
from momify.train.precision import computes_bf16
from momify.train.scratch import dense_gpt2
from momify.train.tokens import reckoned_tokens, tokens_seen

EXPORTERS = {"mom": export_mom, "gpt2": export_gpt2}


def quiet_libraries() -> None:
    """Silence the bars and advice of the libraries underneath; momify shows its own."""
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def check(recipe: Recipe, screen: Screen) -> None:
    """Raise MomifyError for what the source cannot give, before a file is written."""
    if recipe.source.scratch:
        scratch = recipe.source.scratch
        layers, positions, width = scratch.layers, scratch.context, scratch.width
    else:
        config = read_config(locate(recipe.source.model, recipe.source.revision, screen.say))
        layers, positions, width = config.n_layer, config.n_positions, config.n_embd
    if recipe.data.block_length > positions:
        raise MomifyError(f"data.block_length {recipe.data.block_length} exceeds the source's {positions} positions")
    if recipe.mom:
        check_request(request_of(recipe.mom), layers)
        check_ranks(recipe.mom, width)
        if recipe.mom.merge and recipe.mom.init == "random":
            raise MomifyError("merge follows the homes, which init random leaves aside; use init home, or no merge")


def check_ranks(mom: MomBlock, width: int) -> None:
    """Raise MomifyError for a rank above the source's width, which no map needs."""
    for name in ("patch_rank", "step_rank"):
        if (getattr(mom, name) or 0) > width:
            raise MomifyError(f"{name} is {getattr(mom, name)}; the source is {width} wide, use 0 to {width}")


def run_all(recipe: Recipe, run: Run, screen: Screen, resume: bool = False) -> dict[str, Any] | Stopped | None:
    """Everything in order: (phase 1,) convert, train, evaluate, report, export; the report, or where it stopped.

    Several processes train together; the first alone does the rest, and the others get None.
    """
    if stopped := train(recipe, run, screen, resume):
        return stopped
    if not is_first():
        return None
    subject = Subject(run.folder.name, run.model, "mom", run, recipe)
    evaluate(subject, recipe.eval, EvalOptions(), screen)
    report = make_report(subject, EvalOptions(limit=recipe.eval.limit), screen)
    export(subject, "mom", run.export, screen)
    return report


def train(recipe: Recipe, run: Run, screen: Screen, resume: bool = False) -> Stopped | None:
    """Phase 1 where the recipe starts from scratch, then the conversion and phase 2 where it has a mom block."""
    to_pretrain = recipe.source.scratch and not (run.source / "config.json").is_file()
    if to_pretrain and (stopped := pretrain(recipe, run, screen, resume)):
        return stopped
    if recipe.mom is None:
        return None
    with first_then_others():
        if not (run.model / "config.json").is_file():
            convert(recipe, run, screen)
    return recover(recipe, run, screen, resume)


def pretrain(recipe: Recipe, run: Run, screen: Screen, resume: bool = False) -> Stopped | None:
    """Phase 1: train a dense GPT-2 from random weights into `run.source`; without it, those weights as they are."""
    scratch = recipe.source.scratch
    settings = (scratch.train or recipe.train).as_phase_one()
    with first_then_others():
        corpus = read_corpus(recipe.data)
        tokenizer = tokenizer_of(scratch, corpus, run, screen)
        data = tokens_of(recipe.data, tokenizer, screen, corpus)
    set_seed(recipe.run.seed)
    model = dense_gpt2(scratch, tokenizer)
    place = place_for(run.pretraining, "phase 1", recipe, run, screen, resume)
    if scratch.pretrain:
        screen.say(
            f"phase 1: {model.num_parameters():,} parameters, {len(data.train):,} tokens of text "
            f"({len(data.valid):,} held out), {extent(settings, data)}"
        )
        say_where(settings, screen)
        if stopped := fit(model, None, data, settings, place):
            return stopped
    else:
        screen.say(f"no phase 1: the MoM starts from {model.num_parameters():,} random weights")
    with first_then_others():
        if is_first():
            model = (unsharded(model, settings, place) if scratch.pretrain else model).to(torch.float32)
            write_model(run.source, model, tokenizer, {"recipe": recipe.model_dump(), "versions": versions()})
    screen.say(f"wrote {run.source}")
    return None


def extent(settings: TrainBlock, data: TokenData) -> str:
    """How long a training is."""
    return f"{settings.steps:,} steps, {reckoned_tokens(settings.steps, data, settings):,} tokens"


def place_for(folder: Path, title: str, recipe: Recipe, run: Run, screen: Screen, resume: bool) -> Place:
    """Where a phase of a run is trained, and what it tells whom."""
    ready = partial(settle, run)
    return Place(folder, title, screen.console, recipe.run.seed, resume, screen.say, ready, bars=not screen.quiet)


def say_where(settings: TrainBlock, screen: Screen) -> None:
    """Say what of the machine a training leaves unused, or uses at a fraction of its speed."""
    gpus = torch.cuda.device_count()
    if count() == 1 and gpus > 1:
        screen.say(
            f"one of {gpus} GPUs is used; torchrun --nproc-per-node {gpus} -m momify ... takes all, each with "
            "train.batch_size sequences a step"
        )
    warn_of_slow_precision(settings, screen)


def warn_of_slow_precision(settings: TrainBlock, screen: Screen) -> None:
    """Say when bfloat16 was asked for on a device that only imitates it."""
    device = best_device().type
    if settings.precision == "bf16" and not computes_bf16(device):
        screen.say(
            f"warning: this {device} does not compute bfloat16, it imitates it at a fraction of float32's speed; leave "
            "train.precision out, or set fp32"
        )


def tokenizer_of(scratch: Scratch, corpus: Corpus, run: Run, screen: Screen) -> PreTrainedTokenizerBase:
    """The tokenizer of phase 1: the run's own from before, a given one, or one learned from the text."""
    kept = run.pretraining / "tokenizer"
    if kept.is_dir():
        return load_tokenizer(kept)
    if scratch.tokenizer:
        tokenizer = load_tokenizer(scratch.tokenizer)
    else:
        screen.say(f"learning a byte-level BPE of {scratch.vocabulary} entries")
        tokenizer = train_tokenizer(corpus.texts(), scratch.vocabulary)
    with whole_folder(kept) as folder:
        tokenizer.save_pretrained(folder)
    return tokenizer


def unsharded(model: PreTrainedModel, settings: TrainBlock, place: Place) -> PreTrainedModel:
    """The trained model in one piece: from its last checkpoint where several processes held parts of it."""
    if not settings.fsdp or count() == 1:
        return model
    return load_model(place.checkpoints / f"checkpoint-{settings.steps}")


def recover(recipe: Recipe, run: Run, screen: Screen, resume: bool = False) -> Stopped | None:
    """Phase 2: train routers and modules from the source's predictions; `run.model` becomes the trained MoM."""
    provenance = read_provenance(run.model)
    if "steps" not in provenance.get("trained", {}):
        raise MomifyError(
            f"{run.model}/momify.json does not say whether the model is trained; convert the source again"
        )
    if provenance["trained"]["steps"]:
        screen.say(f"{run.model} is trained already")
        return None
    settings = recipe.train
    if settings.budget is None:
        settings = settings.model_copy(update={"budget": recipe.mom.budget})
    tokenizer = load_tokenizer(run.model)
    source = open_own_source(source_folder(recipe, run, screen), run.model)
    check_same_tokens(tokenizer, load_tokenizer(source.folder))
    with first_then_others():
        data = tokens_of(recipe.data, tokenizer, screen)
        if is_first():
            subject = Subject(run.folder.name, run.model, "mom", run, recipe)
            evaluate_ppl(subject, EvalOptions(limit=recipe.eval.limit, roles=("source", "start")), screen)
    model, teacher = load_mom(run.model), load_teacher(source)
    explores = model.config.modules_per_token == 1 and not (settings.supervise or settings.budget)
    training_only = {"embd_pdrop": settings.dropout, "attn_pdrop": settings.dropout, "resid_pdrop": settings.dropout,
                     # with K > 1 gates have a gradient of their own; under a budget routers are fitted, or are told
                     "router_explore": settings.explore if explores else 0.0}  # fmt: skip
    kept = {name: getattr(model.config, name) for name in training_only}
    model.config.update(training_only)
    set_seed(recipe.run.seed)
    pieces = settings.pieces(taught=True, block_length=data.block_length)
    spliced = f", blocks of {pieces} pieces from different places of the text" if pieces > 1 else ""
    screen.say(f"phase 2: {extent(settings, data)} by {settings.optimizer_for(taught=True)}{spliced}")
    say_where(settings, screen)
    place = place_for(run.folder, "phase 2", recipe, run, screen, resume)
    if stopped := fit(model, teacher, data, settings, place, step_layers(provenance)):
        return stopped
    tokens = tokens_seen(place.checkpoints, data, settings)
    trained = {"steps": settings.steps, "tokens": tokens, "splice": pieces}
    provenance |= {"trained": trained, "recipe": recipe.model_dump()}
    with first_then_others():
        if is_first():
            model = unsharded(model, settings, place)
            model.config.update({**kept, "use_cache": True})
            write_model(run.model, model.eval(), tokenizer, provenance)
    screen.say(f"wrote {run.model}, trained")
    return None


def make_report(subject: Subject, options: EvalOptions, screen: Screen) -> dict[str, Any]:
    """Measure the MoM beside its source, write report.html, .md and .json, and give the report."""
    if subject.kind != "mom":
        raise MomifyError(f"{subject.name} is a dense gpt2 model; a report sets a MoM beside its source")
    trained = read_provenance(subject.folder).get("trained", {})
    tokenizer = load_tokenizer(subject.folder)
    check_same_tokens(tokenizer, load_tokenizer(subject.source(screen)))
    scored = evaluate_ppl(subject, options, screen)
    scored |= kept_start(subject, options, scored["source"].protocol)
    source = open_own_source(subject.source(screen), subject.folder)
    name = subject.recipe.source.model or str(source.folder)
    pair = Pair(name, load_dense(source), whole_mom(source), subject.name, load_mom(subject.folder))
    text = subject.data(options.data, options.column)
    data = load_tokens(text, tokenizer, needs="valid")
    weights = contestant("mom", subject, screen).sha256
    recipe = subject.recipe
    origin = Origin(name, source.sha256, recipe.run.seed, recipe.model_dump(), command_line(), weights)
    training = read_training(subject.run.metrics, trained.get("splice", 1)) if subject.run else None
    looks = Looks(training=training, tasks=kept_summaries(subject, screen))
    with screen.progress("measuring") as progress:
        quality = quality_of(scored, bool(trained.get("steps")), len(data.valid), text_of(text, recipe.data))
        report = measure_pair(pair, data, quality, origin, looks, progress)
    write_report(report, subject.results)
    screen.say(f"wrote {subject.results / 'report.html'}, report.md and report.json")
    return report


def whole_mom(source: Source) -> MomForCausalLM:
    """The source as a MoM that leaves nothing out: the same network by a MoM's operators and with its cache."""
    layers = source.config.n_layer
    return assemble(source, network_of(source), choose_homes(Alike(layers), Request(layers, layers)))


def routes(subject: Subject, text: str, target: Path, screen: Screen, leave_out: bool = False) -> Paths:
    """Trace `text` through a MoM and write the page of each token's way; `leave_out`: and the loss without a module.

    Raises MomifyError for a dense model, and for a text that is empty or longer than the model's positions.
    """
    if subject.kind != "mom":
        raise MomifyError(f"{subject.name} is a dense gpt2 model, which routes nothing; routes takes a MoM")
    tokenizer, model = load_tokenizer(subject.folder), load_mom(subject.folder)
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([encoded], dtype=torch.int64)  # (1, T)
    paths, rises = trace_paths(model, ids), None
    if leave_out:
        with screen.progress("leaving out one module after the other") as progress:
            rises = leave_one_out(model, ids, paths, progress)
    pools = {"mha": model.config.num_mha_modules, "ffn": model.config.num_ffn_modules}
    shown = [tokenizer.decode([token]) for token in encoded]
    write_text(target, render_routes(Traced(subject.name, shown, pools, paths, rises)))
    screen.say(f"wrote {target}")
    return paths


def report_of(subject: Subject, screen: Screen) -> dict[str, Any] | None:
    """The report of a subject's very weights, None where there is none; one of other weights is told of and left."""
    path = subject.results / "report.json"
    if not path.exists():
        return None
    report = read_report(path)
    known = report["provenance"].get("mom_sha256")
    current = report["schema_version"] == SCHEMA_VERSION
    if current and known == contestant("mom", subject, screen).sha256:
        return report
    why = "is of other weights" if current and known else "is an older version's"
    screen.say(f"{path} {why}: the model's page goes without it; momify report makes it anew")
    return None


def check_format(form: str) -> None:
    """Raise MomifyError for a format that is not there."""
    if form not in EXPORTERS:
        raise MomifyError(f"export format '{form}' is unknown; known: {', '.join(EXPORTERS)}")


def export(subject: Subject, form: str, target: Path, screen: Screen) -> Path:
    """A folder that loads without momify; says what loads it. Raises MomifyError where the model does not fit."""
    check_format(form)
    if subject.kind != "mom":
        raise MomifyError(f"{subject.name} is a dense gpt2 model, which loads anywhere as it is; export takes a MoM")
    EXPORTERS[form](subject.folder, target, report_of(subject, screen), screen.say)
    screen.say(f"wrote {target}")
    return target
