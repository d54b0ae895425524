"""What a run is: six blocks of YAML, each checked, with the nearest known name when a key is wrong.

A recipe holds everything that changes numbers; command-line flags say only how a run is shown. No torch here:
`momify validate` and `--help` must answer at once.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from momify.errors import MomifyError
from momify.mistakes import first_mistake, one_line
from momify.overrides import NOT_YAML, apply_override, read_yaml
from momify.recipe_blocks import Block, DataBlock, EvalBlock, MomBlock, RunBlock, SourceBlock, TrainBlock, most_pieces
from momify.recipe_choices import check_training

_LONGEST = 1 << 18


class Recipe(Block):
    """One run: its six blocks. Without a `mom` block it is phase 1 alone."""

    run: RunBlock = RunBlock()
    source: SourceBlock
    mom: MomBlock | None = None
    data: DataBlock
    train: TrainBlock = TrainBlock()
    eval: EvalBlock = EvalBlock()

    @model_validator(mode="after")
    def _something_to_do(self) -> "Recipe":
        if self.mom and self.mom.modules_per_token > 1 and (self.train.supervise or self.train.budget):
            raise ValueError("train.supervise and train.budget choose between home and SKIP: mom.modules_per_token 1")
        if self.mom and self.train.fsdp and (self.train.budget or self.mom.budget):
            raise ValueError("a budget corrects whole routers, which train.fsdp shards; leave one of them out")
        if self.mom is None and self.source.scratch is None:
            raise ValueError("nothing to do: add a mom block, or source.scratch to train a dense model")
        if self.mom is None and (keys := self.train.of_phase_two()):
            raise ValueError(f"train.{keys[0]} is of phase 2: add a mom block, or leave it out")
        if (self.train.splice or 1) > (most := most_pieces(self.data.block_length)):
            raise ValueError(f"train.splice {self.train.splice} leaves pieces of less than two tokens of a block of "
                             f"{self.data.block_length}; use at most {most}")  # fmt: skip
        if self.mom and self.mom.init == "random" and self.train.hidden:
            raise ValueError("train.hidden compares steps with the layers they stand for, which mom.init random leaves "
                             "aside; use init home, or train.hidden 0")  # fmt: skip
        if self.source.scratch and not self.source.scratch.pretrain:
            if self.mom is None:
                raise ValueError("nothing to do: source.scratch.pretrain is false and there is no mom block")
            what = "source.scratch.pretrain false leaves no source to learn from"
            if self.train.distill:
                raise ValueError(f"{what}; set train.distill 0 and train.cross_entropy 1")
            if keys := self.train.of_phase_two():
                raise ValueError(f"{what}, as train.{keys[0]} asks for; leave it out")
        return self

    @model_validator(mode="after")
    def _something_to_teach(self) -> "Recipe":
        if self.mom:
            check_training(self.mom, self.train, self.source.scratch.layers if self.source.scratch else None)
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir) if self.run.dir else Path("runs") / self.run.name


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `block.key=value` overrides.

    Raises MomifyError in one line for a missing or broken file, an unknown key (with the nearest known one) or a
    value of the wrong kind.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(_LONGEST + 1)
    except FileNotFoundError:
        raise MomifyError(f"recipe {path} does not exist; recipes/ holds the shipped ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MomifyError(f"recipe {path} cannot be read: {one_line(error)}") from None
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, name: str, overrides: list[str] | None = None) -> Recipe:
    """A Recipe from YAML `text`; `name` stands in error messages. Raises MomifyError as `load_recipe`."""
    if len(text) > _LONGEST:
        raise MomifyError(f"recipe {name} has more than {_LONGEST:,} characters; a recipe is a page, give another file")
    try:
        data = read_yaml(text)
    except NOT_YAML as error:
        raise MomifyError(f"recipe {name} is not valid YAML: {one_line(error)}") from None
    if data is None:
        raise MomifyError(f"recipe {name} is empty; it needs at least the blocks source, mom and data")
    if not isinstance(data, dict):
        raise MomifyError(f"recipe {name} holds a {type(data).__name__}, not blocks; see recipes/demo.yaml")
    for override in overrides or []:
        apply_override(data, override)
    return make_recipe(data, f"recipe {name}")


def make_recipe(data: dict[str, Any], name: str) -> Recipe:
    """A Recipe from nested dicts; `name` opens error messages. Raises MomifyError as `load_recipe`."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise MomifyError(f"{name}: {first_mistake(error, Recipe)}") from None
    except RecursionError:
        raise MomifyError(f"{name}: a block refers to itself; write it without YAML anchors") from None


def change_eval(known: EvalBlock, changes: dict[str, Any]) -> EvalBlock:
    """An eval block with some keys set anew. Raises MomifyError in one line for a value that is wrong."""
    try:
        return EvalBlock.model_validate({**known.model_dump(), **changes})
    except ValidationError as error:
        raise MomifyError(first_mistake(error, EvalBlock)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `parse_recipe` reads back to the same."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
