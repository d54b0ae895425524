"""The blocks of a recipe: every key with its type, its default and what it means, and what does not go together.

docs/recipes.md repeats them (tests/test_docs.py). No torch here.
"""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from momify.task_names import check_tasks


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a NUL character, which no name has")
    return value


def _names_a_run(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise ValueError(
            f"{value[:60]!r} is no name for a run (--name); use at most 100 letters, digits, '.', '_' and '-', the "
            "first a letter or a digit"
        )
    if value.lower() == LATEST:
        raise ValueError(f"'{value}' is the name of the link to the newest run; use another")
    return value


def _at_home(value: str) -> str:
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(
            f"{value[:60]!r} names no home folder that is known here; write it out, or ./~ for a folder '~'"
        )
    return path


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Text = Annotated[str, AfterValidator(_no_nul)]
RunName = Annotated[str, AfterValidator(_names_a_run)]
Names = Annotated[list[Text], BeforeValidator(_one_or_many)]
Optimizer = Literal["adamw", "muon", "normuon"]
HIDDEN = 10.0  # train.hidden where nothing else is said (docs/results.md)
SPLICE = 4  # train.splice
LATEST = "latest"  # beside the runs, a link to the newest of them
EMBEDDING_RATE = 0.5  # train.embedding_rate
RIDGE = 1e-4  # least mom.refit_ridge: from fewer tokens than features it is off by 1%, 1e-5 by 9%, 1e-6 by 200 times
_PHASE_TWO = {"hidden": 0.0, "splice": 1, "stand_ins_first": 0.0, "freeze_embeddings": False}
"""Keys of train that need a source, but for these values (and null)."""
SAME_RESULT = {"micro_batch", "log_every", "keep"}
"""Keys of train that may change while a training lasts: they decide memory and what is kept, not what comes out."""
WITHOUT = {**_PHASE_TWO, "optimizer": "adamw", "matrix_rate": 1.0, "embedding_rate": 1.0, "supervise": 0.0,
           "budget": None, "fsdp": False, "train_tokens": None, "pretrain": True}  # fmt: skip
"""What was done before there were these keys of train, data and source.scratch. A new key belongs here too."""


def most_pieces(block_length: int) -> int:
    """Pieces that a block may be made of: of two tokens or more, as the first of a piece is no label."""
    return max(1, block_length // 2)


class Block(BaseModel):
    """A part of a recipe: unknown keys are refused, values keep their types."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class RunBlock(Block):
    """Where the run goes and its seed."""

    name: RunName = "run"
    """Name of the run and of its folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the order of the data, exploration, and random starts."""
    dir: Annotated[Text, AfterValidator(_at_home)] | None = None
    """Run folder; `runs/<name>` when null."""


class TrainBlock(Block):
    """One training: phase 2 (the MoM learns from its source) or, under `source.scratch`, phase 1."""

    steps: Positive = 5000
    """Optimizer steps."""
    batch_size: Positive = 64
    """Sequences per optimizer step and process."""
    micro_batch: Positive | None = None
    """Sequences per forward pass; null: the whole batch. Must divide batch_size; changes memory, not results (but for
    random draws, and for balance, which is measured in each pass)."""
    optimizer: Optimizer | None = None
    """muon: orthogonalised momentum for the matrices of the modules, AdamW for the rest; normuon: the same, evened out
    over what each matrix puts out; null: normuon where the source's predictions are learned and nothing is sharded,
    else adamw."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-3
    """Highest learning rate, reached after the warm-up."""
    matrix_rate: Annotated[float, Field(gt=0)] = 2.0
    """That of the modules' matrices under muon and normuon, in multiples of learning_rate; they also decay by it."""
    embedding_rate: Annotated[float, Field(gt=0)] | None = None
    """That of token and position embeddings and the head, likewise in multiples, under every optimizer; null: 0.5 under
    muon and normuon where the source's predictions are learned, else 1."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """How the learning rate falls afterwards, to 0."""
    warmup: Share = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and norms have none."""
    clip: Weight = 1.0
    """Largest gradient norm; 0: no clipping."""
    precision: Literal["fp32", "bf16"] | None = None
    """bf16: mixed precision, weights kept in float32; null: bf16 where the machine computes it (an NVIDIA GPU since
    Ampere, a processor with AVX-512 or Arm's BF16), else fp32."""
    distill: Weight = 1.0
    """Weight of the Kullback-Leibler divergence from the source's predictions (phase 2)."""
    cross_entropy: Weight = 0.0
    """Weight of the next-token loss (phase 1 uses nothing else)."""
    hidden: Weight | None = None
    """Weight, at the first step and falling to 0 at the last, of the squared error to the source's residual, relative
    to its variance, wherever the MoM's stands for it (phase 2); null: 10 where the source's predictions are learned and
    steps stand for its layers, else 0."""
    splice: Positive | None = None
    """Pieces, each from another place of the text, that a training block is made of, at most half as many as it has
    tokens: more texts a step, and contexts that the source was not trained on (phase 2); null: 4 where its predictions
    alone are learned (no cross_entropy, supervise, budget), else 1: blocks as they stand."""
    balance: Weight = 0.0
    """Weight of the load-balance loss over routed modules (the paper: 0.01)."""
    dropout: Share = 0.0
    """Dropout of the MoM while it recovers (the paper: none), whatever the source was trained with."""
    explore: Share = 0.05
    """Share of tokens per routed half-step that try a second choice, from which the router learns (K = 1); none under
    supervise or a budget."""
    supervise: Weight = 0.0
    """Weight of the loss by which routers learn what skipping would cost (it moves routers only)."""
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the reachable MACs held while training, by the threshold of SKIP; null: that of mom.budget."""
    stand_ins_first: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps at the beginning in which only what conversion added learns: patches, step deltas, routers
    where they are taught (phase 2)."""
    freeze_embeddings: bool = False
    """Keep token and position embeddings, and with them the head, as the source has them: less memory and time
    (phase 2)."""
    gradient_checkpointing: bool = False
    """Compute each step's activations a second time instead of keeping them: less memory, a third more time."""
    log_every: Positive = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: Positive | None = None
    """Steps between held-out losses; null: as save_every."""
    save_every: Positive = 500
    """Steps between checkpoints: what a killed run loses at most."""
    keep: Positive = 3
    """Newest checkpoints kept; the one of the lowest held-out loss is kept besides."""
    fsdp: bool = False
    """Under torchrun: shard weights, gradients and optimizer over the processes instead of copying them."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainBlock":
        if self.batch_size % (self.micro_batch or self.batch_size):
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}")
        if not (self.distill or self.cross_entropy):
            raise ValueError("distill and cross_entropy are both 0: nothing would be learned")
        if self.fsdp and self.optimizer not in (None, "adamw"):
            raise ValueError(
                f"optimizer {self.optimizer} needs whole matrices, which fsdp shards; leave optimizer out, or fsdp"
            )
        if self.fsdp and self.stand_ins_first:
            raise ValueError("fsdp saves optimizer state of all weights or none; use stand_ins_first 0, or no fsdp")
        return self

    def with_hidden(self, comparable: bool) -> "TrainBlock":
        """The same with `hidden` decided; comparable: whether there is a source, for whose layers steps stand."""
        chosen = self.hidden if self.hidden is not None else HIDDEN if comparable and self.distill else 0.0
        return self.model_copy(update={"hidden": chosen})

    def pieces(self, taught: bool, block_length: int) -> int:
        """`splice` decided for blocks of so many tokens; taught: whether there is a source to learn from."""
        alone = taught and self.distill and not (self.cross_entropy or self.supervise or self.budget)
        chosen = self.splice if self.splice and taught else SPLICE if alone else 1
        return min(chosen, most_pieces(block_length))

    def optimizer_for(self, taught: bool) -> Optimizer:
        """`optimizer` decided; taught: whether there is a source to learn from."""
        return self.optimizer or ("normuon" if taught and self.distill and not self.fsdp else "adamw")

    def embeddings_at(self, taught: bool) -> float:
        """`embedding_rate` decided; taught: whether there is a source to learn from."""
        slower = taught and self.distill and self.optimizer_for(taught) != "adamw"
        return self.embedding_rate or (EMBEDDING_RATE if slower else 1.0)

    def of_phase_two(self) -> list[str]:
        """Keys that are set and mean nothing without a source to start and to learn from."""
        return [key for key, nothing in _PHASE_TWO.items() if getattr(self, key) not in (None, nothing)]

    def as_phase_one(self) -> "TrainBlock":
        """The same without them: for a train block that serves both phases."""
        return self.model_copy(update={key: type(self).model_fields[key].default for key in _PHASE_TWO})


class Scratch(Block):
    """A dense GPT-2 trained from random weights: the paper's phase 1."""

    layers: Positive = 12
    """Layers L."""
    width: Positive = 768
    """Width D of the residual."""
    heads: Positive = 12
    """Attention heads N."""
    context: Positive = 1024
    """Positions."""
    vocabulary: Positive = 50257
    """Entries of the byte-level BPE that is trained on the data; ignored when `tokenizer` is given."""
    tokenizer: Text | None = None
    """Hub name or folder of an existing tokenizer."""
    dropout: Share = 0.0
    """Dropout of the dense model, while it trains and in its config."""
    pretrain: bool = True
    """false: no phase 1, the MoM starts from random weights (the paper's ablation)."""
    train: TrainBlock | None = None
    """Settings of phase 1; null: the recipe's own train block."""

    @model_validator(mode="after")
    def _consistent(self) -> "Scratch":
        if self.train and not self.pretrain:
            raise ValueError("train sets phase 1, which pretrain false leaves out; remove one of them")
        if self.train and (keys := self.train.of_phase_two()):
            raise ValueError(f"train is phase 1, which has no source for {keys[0]}; leave it out")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class SourceBlock(Block):
    """The dense checkpoint: an existing one, or one to be trained."""

    model: Text | None = None
    """Hub name, local folder or builtin:demo."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model."""
    scratch: Scratch | None = None
    """Train the dense model first (phase 1) instead of taking an existing one."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "SourceBlock":
        if (self.model is None) == (self.scratch is None):
            raise ValueError("give either model (hub name, folder, builtin:demo) or scratch (train one), not both")
        return self


class MomBlock(Block):
    """What the source becomes. The pool decides the weights; steps, K and SKIP decide compute and KV cache."""

    mha: Positive
    """Attention modules kept in the pool (weights)."""
    ffn: Positive
    """Feed-forward modules kept in the pool (weights)."""
    depth: Positive | None = None
    """Steps H; null: as many as the source has layers."""
    modules_per_token: Positive = 1
    """K, the modules each token uses per half-step (compute)."""
    mha_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps that may run attention (compute and KV cache); null: one per kept module."""
    ffn_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps that may run a feed-forward module (compute); null: one per kept module."""
    reach: Literal["all", "skip", "home"] | None = None
    """What a running step may choose: every module and SKIP, its home or SKIP, its home only; null: home, or all where
    K > 1, init random or added steps need it."""
    init: Literal["home", "random"] = "home"
    """home: start as the pruned source; random: the paper's start."""
    importance: Literal[
        "trial", "cosine", "greedy", "fitted", "layerdrop", "leave_one_out", "magnitude", "every_other"
    ] | None = None  # fmt: skip
    """How half-layers are chosen for removal. trial: of what cosine, every_other and greedy choose, what a short
    training brings nearest to the source's predictions; cosine: the lowest block influence, ShortGPT's measure; by the
    loss without them, greedy (one after the other, beside what is gone) or leave_one_out; fitted: greedy, by the loss
    that patches and refitted modules leave, on other text (slow); layerdrop: greedy on a copy of the source that has
    learned to do without half-layers; by magnitude; every_other: DistilGPT2's way. null: trial where each
    module has its one step, as it is without other keys, and the source's modules hold at most 100 M weights (gpt2:
    85 M), else cosine."""
    layerdrop_tokens: Positive = 204_800
    """Tokens on which that copy is trained (importance: layerdrop), in steps of 1,024 or a block, at
    train.learning_rate."""
    trial_tokens: Positive = 51_200
    """Tokens on which each choice is tried (importance: trial), in the same steps."""
    calibration_blocks: Positive = 16
    """Blocks of training text on which importance is measured (layerdrop: at least 16,384 tokens; fitted: and 16 for
    each inner value; trials are judged on up to 16,384 others)."""
    refit_tokens: Annotated[int, Field(ge=0)] = 131_072
    """Tokens on which kept modules are refitted, in closed form, to make up for removed ones (at most 52 M / width,
    which bounds memory); 0: not at all, and patches and step deltas start as nothing."""
    refit_modules: bool = True
    """false: kept modules keep their weights, only patches and step deltas are fitted."""
    refit_ridge: Annotated[float, Field(ge=1e-6, le=1e6)] = 30.0  # beyond: rounding, or nothing
    """How strongly refitted modules hold on to their own weights (ridge over the mean variance of what they read):
    30 trains as well as none, 0.001 starts best; below 0.0001 rounding would decide."""
    patch_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the linear patch that SKIP adds in a removed half-layer's place, at most the source's width; 0: none."""
    step_rank: Annotated[int, Field(ge=0)] | None = None
    """Rank of each step's own change to a module that several static steps share, at most the width; null: 16."""
    merge: bool | None = None
    """true: a module that several steps share starts as the mean of the layers that it stands for, heads and neurons
    aligned; with step_rank, as what lies nearest to all of them beyond those changes; null: where there are such."""
    skipped_keys: Literal["home", "masked"] = "home"
    """A token that skips attention: its key and value kept for the others, or masked."""
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    """Routers fitted in closed form to spend this share of the reachable MACs (head left out), token by token, on each
    half-step's home or its SKIP; null: no fit. Implies reach skip."""

    @model_validator(mode="after")
    def _judgeable(self) -> "MomBlock":
        fits = self.refit_tokens and self.init == "home" and (self.refit_modules or self.patch_rank)
        if self.importance == "fitted" and not fits:
            raise ValueError(
                "importance fitted judges by what a fit leaves, and neither kept modules nor patches are fitted; set "
                "init home, refit_tokens, and refit_modules or patch_rank, or use importance greedy"
            )
        return self

    @model_validator(mode="after")
    def _routable(self) -> "MomBlock":
        if self.budget is not None:
            if self.reach not in (None, "skip"):
                raise ValueError(f"budget chooses between home and SKIP, not reach {self.reach}; use reach skip")
            if self.modules_per_token > 1 or self.init == "random":
                raise ValueError("budget needs modules_per_token 1 and init home; change them, or leave budget out")
        return self


class DataBlock(Block):
    """Text to train on and text to measure on."""

    train: Names
    """builtin:demo, a hub dataset (streamed), or paths of txt, jsonl or parquet files."""
    train_tokens: Positive | None = None
    """Largest number of tokens to train on; null: all of the text."""
    valid: Names | None = None
    """Held-out text; null: documents of `train`, chosen by a hash."""
    valid_tokens: Positive = 4_000_000
    """Largest number of held-out tokens (and at most a tenth of the text; a hundredth of a stream)."""
    block_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a training sequence, and of a window when measuring."""
    column: str = "text"
    """Column of jsonl, parquet and hub data that holds the text."""


class EvalBlock(Block):
    """What is measured at the end."""

    tasks: Names = ["ppl"]
    """What to score: ppl (held-out perplexity), glue or one of its tasks, xsum, lm_eval:NAME."""
    data_dir: Text | None = None
    """Folder with glue/TASK/{train,dev}.tsv and xsum/{train,test}.jsonl (or csv, parquet); null: the hub."""
    baseline: bool = True
    """Score the source too, by the same protocol."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0]
    """Seeds of tasks that fine-tune (head, order, dropout); ppl and lm_eval have no randomness."""
    limit: Positive | None = None
    """Quick look: at most so many examples a split (ppl: windows of a block). The result is marked as limited."""
    train_limit: Positive | None = None
    """At most so many training examples; null: as limit."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-4
    """Highest learning rate of fine-tuning; a small model wants more than a large one (gpt2-large: 2e-5)."""
    epochs: Positive = 3
    """Passes over the training examples."""
    batch_size: Positive = 32
    """Examples per optimizer step."""
    max_length: Annotated[int, Field(ge=16)] | None = None
    """Tokens of an example at most; null: 128 for GLUE, the model's positions for XSUM."""
    dropout: Share = 0.1
    """Dropout while fine-tuning, of every model alike."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: mixed precision in fine-tuning, and in scoring what was fine-tuned."""
    beams: Positive = 4
    """Beams of XSUM's decoding."""

    @model_validator(mode="after")
    def _known(self) -> "EvalBlock":
        check_tasks(self.tasks)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} name one twice, which would make the spread look smaller")
        return self
