"""recipe.py: what is accepted, what is refused and in which words."""

from pathlib import Path

import pytest
import yaml

from momify.errors import MomifyError
from momify.overrides import apply_override
from momify.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from momify.recipe_blocks import HIDDEN, SPLICE, TrainBlock

MINIMAL = "source: {model: gpt2}\nmom: {mha: 8, ffn: 12}\ndata: {train: builtin:demo}\n"
DENSE = "source: {scratch: {layers: 2}}\ndata: {train: x.txt}\n"
RECIPES = Path(__file__).parents[1] / "recipes"


def test_shipped_recipes_are_valid() -> None:
    found = sorted(RECIPES.rglob("*.yaml"))
    assert len(found) >= 2
    for path in found:
        assert isinstance(load_recipe(path), Recipe), path
        assert path.read_text().startswith("#"), f"{path} must open with what it is for"


def test_dumped_recipe_reads_back_the_same() -> None:
    recipe = parse_recipe(MINIMAL, "x", ["train.steps=7", "data.valid=held.txt"])
    assert parse_recipe(dump_recipe(recipe), "y") == recipe
    assert recipe.data.valid == ["held.txt"]


def test_overrides_win_and_keep_their_types() -> None:
    recipe = parse_recipe(MINIMAL, "x", ["train.learning_rate=1e-3", "mom.depth=24", "eval.seeds=[1, 2]"])
    assert recipe.train.learning_rate == pytest.approx(0.001)  # YAML 1.1 reads 1e-3 as text
    assert (recipe.mom.depth, recipe.eval.seeds) == (24, [1, 2])


def test_override_creates_a_block_that_the_file_lacks() -> None:
    recipe = parse_recipe(MINIMAL, "x", ["run.name=mine"])
    assert recipe.folder == Path("runs/mine")


@pytest.mark.parametrize(
    ("text", "override", "words"),
    [
        ("", [], "is empty"),
        ("[1, 2]", [], "holds a list"),
        ("a: [", [], "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", [], "not valid YAML"),
        (MINIMAL, ["mom.mah=3"], "unknown key 'mom.mah'; did you mean 'mha'?"),
        (MINIMAL, ["trian.steps=3"], "did you mean 'train'?"),
        (MINIMAL, ["mom.mha=0"], "greater than 0"),
        (MINIMAL, ["mom.mha=-2"], "greater than 0"),
        (MINIMAL, ["mom.mha=two"], "got 'two'"),
        (MINIMAL, ["train.learning_rate=.nan"], "finite"),
        (MINIMAL, ["eval.tasks=[glu]"], "unknown task 'glu'"),
        (MINIMAL, ["train.micro_batch=5"], "does not divide"),
        (MINIMAL, ["train.distill=0"], "nothing would be learned"),
        (MINIMAL, ["run.name=../../etc"], "run.name"),
        (MINIMAL, ["source.scratch={layers: 2}"], "not both"),
        (MINIMAL, ["source.model=null"], "not both"),
        (MINIMAL, ["mom=null"], "not of the form"),
        (MINIMAL, ["mom.budget=0.8", "mom.reach=all"], "use reach skip"),
        (MINIMAL, ["mom.budget=0.8", "mom.init=random"], "budget needs modules_per_token 1 and init home"),
        (MINIMAL, ["mom.budget=0"], "greater than 0"),
        (MINIMAL, ["mom.budget=0.8", "train.fsdp=true"], "which train.fsdp shards"),
        (MINIMAL, ["train.supervise=1", "mom.modules_per_token=2"], "mom.modules_per_token 1"),
        (MINIMAL, ["train.stand_ins_first=1"], "less than 1"),
        (MINIMAL, ["mom.refit_ridge=1.0e308"], "less than or equal to"),
        (MINIMAL, ["train.stand_ins_first=0.5", "train.fsdp=true"], "stand_ins_first 0, or no fsdp"),
        (MINIMAL, ["train.hidden=1", "mom.init=random"], "use init home, or train.hidden 0"),
        (DENSE, ["train.hidden=1"], "train.hidden is of phase 2: add a mom block"),
        (DENSE, ["train.stand_ins_first=0.5"], "train.stand_ins_first is of phase 2: add a mom block"),
        (DENSE, ["train.freeze_embeddings=true"], "train.freeze_embeddings is of phase 2: add a mom block"),
        (DENSE, ["train.splice=4"], "train.splice is of phase 2: add a mom block"),
        (DENSE, ["source.scratch.train={splice: 2}"], "train is phase 1, which has no source for splice"),
        (MINIMAL, ["data.block_length=8", "train.splice=5"], "use at most 4"),
        (MINIMAL, ["train.splice=0"], "greater than 0"),
        (DENSE, ["source.scratch.train={hidden: 1}"], "train is phase 1, which has no source for hidden"),
        (
            f"{DENSE}mom: {{mha: 2, ffn: 2}}",
            ["source.scratch.pretrain=false", "train.distill=0", "train.hidden=1", "train.cross_entropy=1"],
            "leaves no source to learn from",
        ),
        (MINIMAL, ["steps=3"], "not of the form"),
        (MINIMAL, ["train.steps"], "not of the form"),
        (MINIMAL, ["train.steps=[1"], "not valid YAML"),
        ("data: {train: x.txt}", [], "'source' is missing"),
        ("source: {model: gpt2}\ndata: {train: x.txt}", [], "nothing to do"),
        ("source: {scratch: {width: 10, heads: 3}}\ndata: {train: x.txt}", [], "not a multiple"),
        ("source: {scratch: {layrs: 3}}\ndata: {train: x.txt}", [], "did you mean 'layers'?"),
        ("source: &a {model: gpt2, scratch: *a}\ndata: {train: x.txt}", [], "recipe r.yaml"),
    ],
)
def test_mistakes_give_one_line(text: str, override: list[str], words: str) -> None:
    with pytest.raises(MomifyError) as caught:
        parse_recipe(text, "r.yaml", override)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "comparable", "found"),
    [({}, True, HIDDEN), ({}, False, 0.0), ({"distill": 0.0, "cross_entropy": 1.0}, True, 0.0),
     ({"hidden": 0.0}, True, 0.0), ({"hidden": 2.5}, False, 2.5)],
)  # fmt: skip
def test_hidden_states_are_followed_where_the_source_teaches(given: dict, comparable: bool, found: float) -> None:
    assert TrainBlock(**given).with_hidden(comparable).hidden == found


@pytest.mark.parametrize(
    ("given", "taught", "found"),
    [({}, True, SPLICE), ({}, False, 1), ({"splice": 8}, False, 1), ({"cross_entropy": 0.5}, True, 1),
     ({"distill": 0.0, "cross_entropy": 1.0}, True, 1), ({"budget": 0.5}, True, 1), ({"supervise": 1.0}, True, 1),
     ({"splice": 1}, True, 1), ({"splice": 7, "cross_entropy": 0.5}, True, 7)],
)  # fmt: skip
def test_blocks_are_spliced_where_the_source_alone_teaches(given: dict, taught: bool, found: int) -> None:
    assert TrainBlock(**given).pieces(taught, 256) == found


@pytest.mark.parametrize(
    ("given", "taught", "found"),
    [({}, True, "normuon"), ({}, False, "adamw"), ({"fsdp": True}, True, "adamw"),
     ({"optimizer": "muon"}, True, "muon"), ({"optimizer": "adamw"}, True, "adamw"),
     ({"optimizer": "normuon"}, False, "normuon"),
     ({"distill": 0.0, "cross_entropy": 1.0}, True, "adamw")],
)  # fmt: skip
def test_the_optimizer_is_normuon_where_a_source_teaches(given: dict, taught: bool, found: str) -> None:
    assert TrainBlock(**given).optimizer_for(taught) == found


@pytest.mark.parametrize(("length", "found"), [(2, 1), (3, 1), (4, 2), (8, 4)])
def test_short_blocks_are_spliced_of_pieces_of_two_tokens(length: int, found: int) -> None:
    assert TrainBlock().pieces(True, length) == found


def test_phase_one_knows_no_splicing() -> None:
    assert TrainBlock(splice=8).of_phase_two() == ["splice"]
    assert TrainBlock(splice=8).as_phase_one() == TrainBlock()
    assert not TrainBlock(splice=1, hidden=0.0).of_phase_two()


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(MomifyError, match="does not exist"):
        load_recipe(tmp_path / "no.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MomifyError, match="cannot be read"):
        load_recipe(tmp_path / "b.yaml")
    with pytest.raises(MomifyError, match="cannot be read"):
        load_recipe(tmp_path)


def test_a_recipe_that_is_no_page_is_refused(tmp_path: Path) -> None:
    """It is not read to its end, so its length is not known."""
    (tmp_path / "long.yaml").write_text("#" + "x" * 500_000)
    with pytest.raises(MomifyError, match=r"long.yaml has more than 262,144 characters; a recipe is a page"):
        load_recipe(tmp_path / "long.yaml")


def test_every_field_can_be_overridden() -> None:
    """A key that the schema knows but nothing accepts would be dead."""
    recipe = parse_recipe(MINIMAL, "x")
    for block, values in recipe.model_dump(mode="json", exclude={"source"}).items():
        for key, value in values.items():
            again = parse_recipe(MINIMAL, "x", [f"{block}.{key}={yaml.safe_dump(value, default_flow_style=True)}"])
            assert again == recipe, (block, key)


@pytest.mark.parametrize("text", ["a: " + "[" * 3000, "a: " + "{b: " * 101, "a: " + "[" * 101 + "]" * 101])
def test_brackets_without_end_are_refused_before_they_are_read(text: str) -> None:
    """PyYAML takes seconds for 3,000 of them."""
    with pytest.raises(MomifyError, match=r"recipe bad.yaml is not valid YAML: more than 100 brackets"):
        parse_recipe(text, "bad.yaml")
    with pytest.raises(MomifyError, match="the value is not valid YAML"):
        apply_override({}, f"train.steps={text}")


def test_brackets_side_by_side_are_no_depth() -> None:
    data = {}
    apply_override(data, f"mom.mha_homes=[{', '.join(['[1]'] * 500)}, '[[[', {'[' * 50}{']' * 50}]")
    assert len(data["mom"]["mha_homes"]) == 502
