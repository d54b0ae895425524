"""The command line: parse, call one function, show. Heavy imports stay inside the commands, so --help is instant."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from momify.convert_command import convert
from momify.errors import MomifyError
from momify.plan.command import plan
from momify.processes import let_first_speak
from momify.sweep.command import sweep
from momify.terminal import (
    INTERRUPTED,
    AsJson,
    Overrides,
    Overwrite,
    Quiet,
    Resume,
    UsageError,
    end,
    listed,
    open_screen,
    say_stopped,
    say_usage,
)

if TYPE_CHECKING:
    from momify.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress a GPT-2-style checkpoint into a Mixture-of-Modules model, with numbers that can be trusted.",
)

Model = Annotated[
    str | None,
    typer.Argument(help="Hub name, folder, run name or builtin:demo; the latest run if left out.", show_default=False),
]
RecipePath = Annotated[Path, typer.Argument(help="A recipe file (YAML).", show_default=False)]
Data = Annotated[
    list[str] | None, typer.Option("--data", help="Text to measure on, all of it (txt, jsonl, parquet); repeatable.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Windows of held-out text to score; all if left out.")]


@app.command(epilog="Example: momify demo")
def demo(
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The whole job on the model that ships with momify: convert, train, measure, report, export. No network."""
    from momify.demo.recipe import demo_recipe

    _run(demo_recipe(overrides), quiet, as_json, resume, overwrite)


@app.command(epilog="Example: momify run recipes/demo.yaml train.steps=100")
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """A recipe from beginning to end: convert, train, eval, report, export. Writes runs/<name>/."""
    from momify.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if loaded.mom is None:
        raise MomifyError(f"recipe {recipe} has no mom block: it is phase 1 alone; start it with momify train {recipe}")
    _run(loaded, quiet, as_json, resume, overwrite)


def _run(loaded: "Recipe", quiet: bool, as_json: bool, resume: bool = False, overwrite: bool = False) -> None:
    """Run a recipe and show its verdict on the last line."""
    screen = open_screen(quiet, as_json)
    from momify.evaluation import check_tasks_data
    from momify.pipeline import check, run_all
    from momify.runs import opened_run
    from momify.train.fit import Stopped

    check(loaded, screen)
    check_tasks_data(loaded.eval)
    with opened_run(loaded, resume, overwrite) as folder:
        screen.to_log(folder.log)
        report = run_all(loaded, folder, screen, resume)
    if isinstance(report, Stopped):
        say_stopped(report, folder.resume_line("run"))
    if report is not None:
        _show_report(report, as_json)


app.command(epilog="Example: momify convert gpt2-large --mha 8 --ffn 36 --mha-steps 16")(convert)
app.command(epilog="Example: momify plan gpt2-large --mha 8 --ffn 36 --mha-steps 16")(plan)
app.command(epilog="Example: momify sweep builtin:demo --mha 12,8,4 --ffn 12,10,8 --tokens 400000")(sweep)


@app.command(epilog="Example: momify train recipes/demo.yaml train.steps=100 --resume")
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a recipe: phase 1 if it starts from scratch, then the MoM, converted if needed. Writes runs/<name>/."""
    from momify.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)  # before torch: a typo is told at once
    screen = open_screen(quiet)
    from momify.pipeline import check
    from momify.pipeline import train as train_recipe
    from momify.runs import opened_run

    check(loaded, screen)
    with opened_run(loaded, resume, overwrite) as folder:
        screen.to_log(folder.log)
        stopped = train_recipe(loaded, folder, screen, resume)
    if stopped:
        say_stopped(stopped, folder.resume_line("train"))
    screen.result(folder.model if loaded.mom else folder.source)


@app.command("eval", epilog="Example: momify eval --tasks glue,xsum,ppl --data-dir data --seeds 0,1,2")
def evaluate(
    model: Model = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="ppl, glue or one of its tasks, xsum, lm_eval:NAME; by commas. Else the recipe's."),
    ] = None,
    baseline: Annotated[
        bool | None, typer.Option(help="Score the source too, by the same protocol; as the recipe says if left out.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="Another model to score: hub name, folder or run; by commas, repeatable.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder with glue/TASK/{train,dev}.tsv and xsum/; the hub if left out.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of fine-tuning, as in 0,1,2.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Quick look: so many examples a split, windows of text for ppl.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Another key of the recipe's eval block: epochs=5; repeatable.")
    ] = None,
    keep_heads: Annotated[bool, typer.Option("--keep-heads", help="Keep fine-tuned models in eval/heads/.")] = False,
    data: Data = None,
    column: Annotated[str, typer.Option(help="Column that holds the text in jsonl and parquet files.")] = "text",
    block: Annotated[int | None, typer.Option(min=2, help="ppl's window in tokens; the recipe's if left out.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows; the block if left out.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score a model, and its source by the same protocol: perplexity, GLUE, XSUM, lm-eval. Writes runs/<name>/eval/."""
    from momify.overrides import read_settings
    from momify.recipe import change_eval
    from momify.recipe_blocks import EvalBlock

    given = {"tasks": listed(tasks), "seeds": listed(seeds), "data_dir": data_dir, "baseline": baseline, "limit": limit}
    given = {key: value for key, value in given.items() if value is not None} | read_settings(settings or [])
    change_eval(EvalBlock(), given)  # before anything slow
    screen = open_screen(quiet, as_json)
    from momify.evaluation import EvalOptions
    from momify.evaluation import evaluate as evaluate_subject
    from momify.report.tasks import comparison_table, protocol_lines
    from momify.subject import find_subject

    subject = find_subject(model, screen)
    asked = change_eval(subject.recipe.eval if subject.recipe else EvalBlock(), given)
    if subject.run:
        screen.to_log(subject.run.log)
    others = tuple(name for names in also or [] for name in listed(names))
    options = EvalOptions(data, column, block, stride, also=others, keep_heads=keep_heads)
    found = evaluate_subject(subject, asked, options, screen)
    if as_json:
        typer.echo(json.dumps({one["task"]: one for one in found}, indent=2))
        return
    open_screen().table("scores", *comparison_table(found))
    for line in protocol_lines(found):
        typer.echo(line)


@app.command(epilog="Example: momify report demo")
def report(
    model: Model = None,
    data: Data = None,
    limit: Limit = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Before and after: parameters, MACs, memory, speed, perplexity, routing. Writes report.html, .md and .json."""
    screen = open_screen(quiet, as_json)
    from momify.pipeline import EvalOptions, make_report
    from momify.subject import find_subject

    subject = find_subject(model, screen)
    known = subject.recipe.eval.limit if subject.recipe else None
    _show_report(make_report(subject, EvalOptions(data, limit=limit or known), screen), as_json)


def _show_report(found: dict[str, Any], as_json: bool) -> None:
    from momify.report.words import verdict

    typer.echo(json.dumps(found, indent=2) if as_json else verdict(found))


@app.command(epilog="Example: momify export demo --format gpt2 --out exported/")
def export(
    model: Model = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="mom: any MoM, for torch and transformers with trust_remote_code. "
            "gpt2: one whose steps never choose, as a plain GPT-2 with the same logits.",
        ),
    ] = "mom",
    out: Annotated[Path | None, typer.Option(help="Target folder; runs/<name>/export if left out.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a folder that loads without momify, as a MoM or, where no step chooses, as a plain GPT-2."""
    screen = open_screen(quiet)
    from momify.pipeline import check_format
    from momify.pipeline import export as export_subject
    from momify.subject import find_subject

    check_format(form)
    subject = find_subject(model, screen)
    screen.result(export_subject(subject, form, out or subject.results / "export", screen))


@app.command(epilog='Example: momify generate builtin:demo --prompt "def "')
def generate(
    model: Model = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to write at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many likeliest tokens; 0: all.")] = 50,
    beams: Annotated[int, typer.Option(min=1, help="Beams; more than 1 searches instead of drawing.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    as_json: AsJson = False,
) -> None:
    """Text from a model, dense or MoM, and how fast it came."""
    screen = open_screen()
    from momify.data.tokenizer import load_tokenizer
    from momify.generate import Sampling, generate_text
    from momify.models import load_model
    from momify.subject import find_subject

    subject = find_subject(model, screen)
    sampling = Sampling(max_new_tokens, temperature, top_k, beams, seed)
    found = generate_text(load_model(subject.folder), load_tokenizer(subject.folder), prompt, sampling)
    if as_json:
        typer.echo(json.dumps({"text": found.text, "tokens": found.tokens, "tokens_per_second": found.speed}))
        return
    typer.echo(found.text)
    typer.echo(f"{found.tokens} tokens, {found.speed:.0f} tokens/s", err=True)


@app.command(epilog='Example: momify routes demo --text "def main():" --leave-one-out')
def routes(
    model: Model = None,
    text: Annotated[str | None, typer.Option(help="Text to trace.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="File that holds the text instead.", show_default=False)] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Also show what the text's loss becomes without each module.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The page; runs/<name>/routes.html if left out.")] = None,
    quiet: Quiet = False,
) -> None:
    """Which module each token of a text used at each step, as a page to look at. Writes routes.html."""
    if (text is None) == (file is None):
        raise MomifyError("routes needs a text: give either --text or --file")
    screen = open_screen(quiet)
    from momify.files import read_text
    from momify.pipeline import routes as trace_routes
    from momify.subject import find_subject

    subject = find_subject(model, screen)
    content = text if file is None else read_text(file)
    target = out or subject.results / "routes.html"
    trace_routes(subject, content, target, screen, leave_out)
    screen.result(target)


@app.command(epilog="Example: momify validate recipes/*.yaml")
def validate(
    recipes: Annotated[list[Path], typer.Argument(help="Recipe files.", show_default=False)],
) -> None:
    """Check recipes without running them; exit code 2 if one is wrong."""
    from momify.recipe import load_recipe

    wrong = 0
    for path in recipes:
        try:
            load_recipe(path)
            typer.echo(f"{path}: ok")
        except MomifyError as error:
            wrong += 1
            typer.echo(f"momify: {error}", err=True)
    if wrong:
        raise typer.Exit(2)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("momify"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    try:
        code = app(prog_name="momify", standalone_mode=False)  # what a command ends with by typer.Exit, else None
    except UsageError as error:
        let_first_speak()
        say_usage(error)
        sys.exit(error.exit_code)
    except MomifyError as error:
        let_first_speak()
        typer.echo(f"momify: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # `momify eval | head`
        sys.exit(1)
    except KeyboardInterrupt:
        end(INTERRUPTED)
    except typer.Abort:  # typer's word for the end of what it reads
        typer.echo("momify: aborted", err=True)
        sys.exit(1)
    end(code)


if __name__ == "__main__":
    main()
