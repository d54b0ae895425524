"""Converting, from a recipe to a MoM in a run folder: what is judged, chosen, fitted and written, in this order."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from momify.convert.assemble import RouterSettings, assemble, mom_config, network_of
from momify.convert.describe import COST_HEAD, Removals, removal_rows
from momify.convert.fitted_losses import PARTS, FittedLosses
from momify.convert.homes import KINDS, Alike, HomePlan, Request, choose_homes, removal_quotas, with_step_rank
from momify.convert.importance import Importance, judged, measure_importance
from momify.convert.kept_importance import importance_file, kept_importance
from momify.convert.kept_losses import kept_losses
from momify.convert.layerdrop import trained_with_drops
from momify.convert.merge import shared_modules
from momify.convert.network import Network
from momify.convert.refit import Fitted, Fitting, has_to_fit, most_tokens, refit, unfitted
from momify.convert.routers import FIT_TOKENS, RouterFit, fit_routers
from momify.convert.short_training import ShortTraining
from momify.convert.source import Source, open_source
from momify.convert.trial import CANDIDATES, TRIED_WEIGHTS, best_of_trials, set_apart, tells
from momify.data.blocks import Needs, TokenData, load_tokens
from momify.data.documents import Corpus
from momify.data.tokenizer import load_tokenizer
from momify.devices import best_device, device_for
from momify.errors import MomifyError
from momify.measure.budget import check_budget
from momify.model import MomConfig, MomForCausalLM
from momify.models import generation_settings, locate, write_model
from momify.recipe import Recipe
from momify.recipe_blocks import RIDGE, DataBlock, MomBlock
from momify.report.provenance import versions
from momify.runs import Run
from momify.screen import Screen
from momify.train.precision import computes_bf16

JUDGED_TOKENS = 16_384  # at least, where sets of half-layers differ less than on the source as it is
COPIES, LEARNING_COPIES = 2, 6  # of the source's weights at once; a copy that learns has gradients and two moments
WORKING_BYTES = 2 << 30  # activations, residuals, sums
FITTED_ROWS = 16  # of text for each input of the widest module
MEASURING = "measuring what each half-layer is worth"


def convert(recipe: Recipe, run: Run, screen: Screen) -> None:
    """Take the source apart, say what goes, refit what stays, and write the MoM as it starts to `run.model`."""
    check_ridge(recipe.mom)
    source = open_source(source_folder(recipe, run, screen))
    if source.dtype != torch.float32:
        screen.say(f"the source's weights are {str(source.dtype).removeprefix('torch.')}; the MoM keeps float32")
    tokenizer, generation = load_tokenizer(source.folder), generation_settings(source.folder)
    network = network_of(source)
    network = network.to(conversion_device(network, recipe.mom.importance, screen))
    text = CalibrationText(recipe, tokenizer, screen, network.device)
    routers = RouterSettings(skipped_keys=recipe.mom.skipped_keys, seed=recipe.run.seed)
    if recipe.mom.budget is not None:
        check_budget(any_config(source, network, recipe.mom, routers), recipe.data.block_length, recipe.mom.budget)
    importance, plan = choose(network, text, source.sha256, screen)
    target = mom_config(source.config, plan, source.tied, routers)
    removals = removal_rows(plan, importance, source.config, target)
    show_removals(removals, f"{source.name} -> {run.folder.name}", screen, recipe.mom.budget)
    fitted = fit_parts(network, plan, text, screen).to("cpu")
    network = replace(network, layers=fitted.layers, frame=network.frame.to("cpu"))
    model = assemble(source, network, plan, routers=routers, stand_ins=fitted.stand_ins)
    routing = {} if recipe.mom.budget is None else {"routing": route(model, text, screen).to_dict()}
    provenance = {
        "source": {"model": recipe.source.model or str(run.source), "sha256": source.sha256},
        "recipe": recipe.model_dump(),
        "versions": versions(),
        "plan": plan.to_dict(),
        "importance": importance.to_dict(),
        **routing,
        "trained": {"steps": 0, "tokens": 0},
    }
    write_model(run.model, model, tokenizer, provenance, generation)
    screen.say(f"wrote {run.model}")


def conversion_device(network: Network, way: str | None, screen: Screen) -> torch.device:
    """Where a network is measured, trained for a trial and fitted: a GPU that has room for it, else the processor."""
    learns = way in ("trial", "layerdrop") or (way is None and network.layers.num_weights <= TRIED_WEIGHTS)
    held = LEARNING_COPIES if learns else COPIES
    device = device_for(4 * held * network.num_weights + WORKING_BYTES)
    if device.type != best_device().type:
        screen.say(f"converting on the processor: {best_device().type} has too little memory free, or no float64")
    return device


def check_ridge(mom: MomBlock) -> None:
    """Raise MomifyError for a ridge that rounding would decide; a recipe that was made into a model with it is read."""
    if mom.refit_ridge < RIDGE:
        raise MomifyError(f"mom.refit_ridge is {mom.refit_ridge:g}; below {RIDGE:g} rounding would decide, use more")


def any_config(source: Source, network: Network, mom: MomBlock, routers: RouterSettings) -> MomConfig:
    """The MoM's config before it is known what goes, which changes no MACs."""
    plan = choose_homes(Alike(network.layers.num_layers), request_for(network, mom))
    return mom_config(source.config, plan, source.tied, routers)


@dataclass(frozen=True)
class CalibrationText:
    """The training text of a recipe, read when first needed: a conversion that removes nothing needs none."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    screen: Screen
    device: torch.device

    def tokens(self, count: int) -> torch.Tensor:
        """At least `count` tokens as blocks (S, T), spread over the text."""
        length = self.recipe.data.block_length
        data = tokens_of(self.recipe.data, self.tokenizer, self.screen, needs="train")
        return data.spread_blocks(-(-count // length)).to(self.device)

    def blocks(self, fewest: int = 0) -> torch.Tensor:
        """What importance is measured on, (S, T): the blocks of the recipe, at least `fewest` tokens."""
        return self.tokens(max(self.recipe.mom.calibration_blocks * self.recipe.data.block_length, fewest))

    def blocks_to_fit(self, network: Network) -> torch.Tensor:
        """The same where modules are fitted: several rows for each of their inputs, as far as memory goes."""
        width, inner = network.frame.wte.shape[1], network.layers.down_weight.shape[1]
        length, blocks = self.recipe.data.block_length, self.recipe.mom.calibration_blocks
        wished = max(blocks * length, JUDGED_TOKENS, FITTED_ROWS * inner)
        return self.tokens(max(min(wished, most_tokens(width)), PARTS * length))


def choose(network: Network, text: CalibrationText, source_sha256: str, screen: Screen) -> tuple[Importance, HomePlan]:
    """What each half-layer is worth on calibration text, and from that what stays and where each step starts."""
    mom, layers = text.recipe.mom, network.layers.num_layers
    request = request_for(network, mom)
    quotas = removal_quotas(request, layers)
    if mom.importance == "trial" and not tells(request, layers):
        screen.say("warning: trials train each module at its one step, which is not what is converted here")
    if not any(quotas):
        importance = Importance.unmeasured(layers)
    else:
        importance = judge(network, text, source_sha256, quotas, mom.importance or usual_way(network, text, request))
    return importance, choose_homes(importance, request)


def usual_way(network: Network, text: CalibrationText, request: Request) -> str:
    """trial where it tries what is converted, there is text for it and the source is not too large; else cosine."""
    weights = network.layers.num_weights
    if not tells(request, network.layers.num_layers) or len(text.tokens(2 * text.recipe.data.block_length)) < 2:
        return "cosine"
    if weights > TRIED_WEIGHTS:
        text.screen.say(
            f"the source's modules hold {weights / 1e6:,.0f} M weights: what goes is chosen by block influence; "
            f"--importance trial tries choices in a short training first, in {20 * weights / 2**30:.0f} GiB of memory"
        )
        return "cosine"
    return "trial"


def judge(network: Network, text: CalibrationText, source_sha256: str, quotas: tuple[int, int], way: str) -> Importance:
    """What each half-layer is worth on calibration text, by one of the ways of `mom.importance`."""
    ways = {"layerdrop": judge_by_copy, "fitted": judge_fitted, "trial": judge_by_trial}
    if way in ways:
        return ways[way](network, text, source_sha256, quotas)
    tokens = text.blocks()
    with kept_losses(source_sha256, tokens) as known, text.screen.progress(MEASURING) as progress:
        return measure_importance(network, tokens, quotas, way, progress, known)


def judge_fitted(network: Network, text: CalibrationText, source_sha256: str, quotas: tuple[int, int]) -> Importance:
    """By what is left of a removal once patches and kept modules, each at its own step, are fitted to make up for it.

    Modules that steps share, and layers that go with both halves, are judged like all others.
    """
    mom, tokens = text.recipe.mom, text.blocks_to_fit(network)
    fitting = Fitting(mom.refit_ridge, modules=mom.refit_modules)
    way = f"{mom.patch_rank} " + (f"{mom.refit_ridge}" if mom.refit_modules else "")
    with kept_losses(source_sha256, tokens, way) as known, text.screen.progress(MEASURING) as progress:
        return judged(FittedLosses(network, tokens, fitting, mom.patch_rank, known=known), quotas, "fitted", progress)


def judge_by_copy(network: Network, text: CalibrationText, source_sha256: str, quotas: tuple[int, int]) -> Importance:
    """By a copy of the source that learned to do without half-layers."""
    tokens, lessons = text.blocks(JUDGED_TOKENS), text.tokens(text.recipe.mom.layerdrop_tokens)
    training = short_training(text.recipe, "layerdrop", text.device)

    def measure() -> Importance:
        copy = learned(network, lessons, quotas, training, text.screen)
        with text.screen.progress(MEASURING) as progress:
            return measure_importance(copy, tokens, quotas, "layerdrop", progress)

    path = importance_file(source_sha256, (tokens, lessons), f"{quotas} {training}")
    return kept_importance(path, measure)


def judge_by_trial(network: Network, text: CalibrationText, source_sha256: str, quotas: tuple[int, int]) -> Importance:
    """By what a short training leaves of several ways' choices."""
    length = text.recipe.data.block_length
    tokens = text.tokens(text.recipe.mom.trial_tokens + JUDGED_TOKENS)
    lessons, judged = set_apart(tokens, -(-JUDGED_TOKENS // length), text.blocks())
    training = short_training(text.recipe, "trial", text.device)

    def measure() -> Importance:
        text.screen.say(
            f"what goes is tried: the choices of {', '.join(CANDIDATES)}, each in a training on "
            f"{lessons.numel():,} tokens (--importance cosine does without)"
        )
        candidates = [judge(network, text, source_sha256, quotas, way) for way in CANDIDATES]
        with text.screen.progress("trying each choice in a short training") as progress:
            return best_of_trials(network, candidates, lessons, judged, training, progress)

    path = importance_file(source_sha256, (text.blocks(), lessons, judged), f"{quotas} {training} {CANDIDATES}")
    return kept_importance(path, measure)


def short_training(recipe: Recipe, way: str, device: torch.device) -> ShortTraining:
    """How a copy learns, on `device`, what half-layers are judged by: at the learning rate of the training to come."""
    train = recipe.train
    bf16 = train.precision != "fp32" and computes_bf16(device.type)
    return ShortTraining(way, train.learning_rate, bf16, recipe.run.seed)


def learned(
    network: Network, lessons: torch.Tensor, quotas: tuple[int, int], training: ShortTraining, screen: Screen
) -> Network:
    """A copy of the source that has learned to do without half-layers, on lessons (S, T)."""
    with screen.progress("learning to do without half-layers") as progress:
        return trained_with_drops(network, lessons, quotas, training, progress)


def fit_parts(network: Network, plan: HomePlan, text: CalibrationText, screen: Screen) -> Fitted:
    """What stays and what stands in, fitted in closed form to make up for what goes; writes into the network's layers.

    Left as it is where nothing goes, and where homes mean nothing (init random).
    """
    mom = text.recipe.mom
    merge = any(plan.adapted(kind) for kind in KINDS) if mom.merge is None else mom.merge
    fitting = Fitting(mom.refit_ridge, modules=mom.refit_modules, merge=merge, in_place=True)
    if plan.init == "random":
        return Fitted(network.layers)
    if merge:
        shared = len(shared_modules(plan))
        screen.say(f"shared modules made of all the layers that they stand for, aligned: {shared}")
    if not mom.refit_tokens or not has_to_fit(plan, fitting):
        return unfitted(network, plan, fitting)
    with screen.progress("fitting what stays and what stands in") as progress:
        tokens = text.tokens(min(mom.refit_tokens, most_tokens(network.frame.wte.shape[1])))
        fitted = refit(network, plan, tokens, fitting, progress)
    what = ["modules that stay"] * fitting.modules + ["what stands in"] * bool(fitted.stand_ins)
    screen.say(f"fitted {' and '.join(what)} on {tokens.numel():,} tokens, to make up for what goes")
    return fitted


def route(model: MomForCausalLM, text: CalibrationText, screen: Screen) -> RouterFit:
    """Fit the routers of `model`, in place, so that tokens spend the recipe's budget."""
    recipe = text.recipe
    with screen.progress("fitting routers") as progress:
        tokens = text.tokens(min(FIT_TOKENS, most_tokens(model.config.hidden_size)))
        modules = recipe.mom.refit_modules and recipe.mom.refit_tokens > 0
        found = fit_routers(model.to(text.device), tokens, recipe.mom.budget, recipe.run.seed, modules, progress)
        model.to("cpu")
    screen.say(
        f"fitted routers on {tokens.numel():,} tokens: {found.share:.1%} of the reachable MACs are spent "
        f"(router_threshold {found.threshold:.3f})"
    )
    return found


def show_removals(removals: Removals, title: str, screen: Screen, budget: float | None = None) -> None:
    """In plain words and as tables: what goes, and what that saves; what a budget saves comes on top."""
    for line in removals.lines:
        screen.say(line)
    screen.table(title, removals.head, removals.rows)
    whole = "" if budget is None else f", if no token skips (the budget spends {budget:.0%} of what can be skipped)"
    screen.table(f"cost{whole}", COST_HEAD, removals.costs)


def request_of(mom: MomBlock) -> Request:
    """The conversion that a recipe's mom block asks for."""
    names = ("mha", "ffn", "depth", "modules_per_token", "mha_steps", "ffn_steps", "init", "reach", "patch_rank",
             "step_rank")  # fmt: skip
    request = Request(**{name: getattr(mom, name) for name in names})
    return request if mom.budget is None else replace(request, reach="skip")


def request_for(network: Network, mom: MomBlock) -> Request:
    """The same with the rank of step changes that a source of this width gets."""
    return with_step_rank(request_of(mom), network.frame.wte.shape[1])


def source_folder(recipe: Recipe, run: Run, screen: Screen) -> Path:
    """The folder of the dense model that a recipe starts from."""
    return run.source if recipe.source.scratch else locate(recipe.source.model, recipe.source.revision, screen.say)


def tokens_of(
    data: DataBlock,
    tokenizer: PreTrainedTokenizerBase,
    screen: Screen,
    corpus: Corpus | None = None,
    needs: Needs = "both",
) -> TokenData:
    """The text as tokens, with a bar where they have to be made first."""
    with screen.progress("turning text into tokens") as progress:
        return load_tokens(data, tokenizer, corpus, progress, needs)
