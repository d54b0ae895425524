"""The command `momify plan`: parse, call, show. Heavy imports stay inside, and torch stays out altogether."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from momify.errors import MomifyError

if TYPE_CHECKING:
    from momify.plan.make import Premises, Speed
    from momify.screen import Screen


def plan(
    model: Annotated[
        str, typer.Argument(help="Hub name, folder, run, builtin:demo, or a recipe file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="For a recipe: block.key=value.", show_default=False)
    ] = None,
    mha: Annotated[int | None, typer.Option(help="Attention modules to keep.", show_default=False)] = None,
    ffn: Annotated[int | None, typer.Option(help="Feed-forward modules to keep.", show_default=False)] = None,
    depth: Annotated[int | None, typer.Option(help="Steps H; as the source if left out.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Modules per token and half-step, K; 1 if left out.")] = None,
    mha_steps: Annotated[int | None, typer.Option(help="Steps that run attention; one per module if left out.")] = None,
    ffn_steps: Annotated[
        int | None, typer.Option(help="Steps that run a feed-forward module; one per module if left out.")
    ] = None,
    reach: Annotated[
        str | None, typer.Option(help="What a running step may choose: all, skip, home; home where K is 1 if left out.")
    ] = None,
    patch_rank: Annotated[
        int | None, typer.Option(min=0, help="Rank of what SKIP adds in a removed half's place; 0 if left out.")
    ] = None,
    step_rank: Annotated[
        int | None, typer.Option(min=0, help="Rank of each step's change to a module it shares; 16 if left out.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Search instead: flops<=0.84,kv<=0.5,params<=0.75, as parts of the source's.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence; at most 1024 if left out.")] = None,
    device: Annotated[str, typer.Option(help="GPU that the training time is reckoned for.")] = "a100",
    tflops: Annotated[float | None, typer.Option(min=0.001, help="TFLOP/s per GPU that a training reaches.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """What a conversion will cost, from the config alone: parameters, memory, MACs, training. Writes nothing."""
    from rich.console import Console

    from momify.convert.homes import Request
    from momify.plan.make import make_plan, premises, training_speed
    from momify.plan.show import FLAGS, HEAD, comparison, training_lines
    from momify.screen import Screen

    screen, speed = Screen(Console(stderr=as_json)), training_speed(device, tflops)
    given = premises(model, tokens, overrides or ())
    asked = {"mha": mha, "ffn": ffn, "depth": depth, "modules_per_token": top_k, "mha_steps": mha_steps,
             "ffn_steps": ffn_steps, "reach": reach, "patch_rank": patch_rank, "step_rank": step_rank}  # fmt: skip
    asked = {key: value for key, value in asked.items() if value is not None}
    _check_said_once(model, given, asked, budget)
    if budget is not None:
        _show_search(given, budget, speed, screen, as_json)
        return
    if (mha is None) != (ffn is None) or (mha is None and given.request is None):
        raise MomifyError(f"a plan for {model} needs both --mha and --ffn, or --budget to search for them")
    made = make_plan(given, given.request or Request(**asked), speed)
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
        return
    screen.table(f"{given.name} at {given.block:,} tokens", HEAD, comparison(made.source, made.mom))
    for line in (FLAGS, *training_lines(made, given.train), made.line):
        typer.echo(line)


def _check_said_once(model: str, given: "Premises", asked: dict[str, object], budget: str | None) -> None:
    """Raise MomifyError where options, a recipe's mom block and --budget each would say what to convert to."""
    key = next(iter(asked), "")
    flag = "--top-k" if key == "modules_per_token" else f"--{key.replace('_', '-')}"
    if asked and budget is not None:
        raise MomifyError(f"{flag} says what --budget is to find; leave one of them out")
    if asked and given.request:
        raise MomifyError(f"{flag} does not go with {model}, whose mom block says it; give mom.{key}={asked[key]}")
    if budget is not None and given.request:
        raise MomifyError(
            f"--budget does not go with {model}, whose mom block says what to convert to; "
            f"search for its source alone: momify plan {given.name} --budget ..."
        )


def _show_search(given: "Premises", budget: str, speed: "Speed", screen: "Screen", as_json: bool) -> None:
    """The table of what fits, and a line to paste for each."""
    from momify.plan.make import make_search
    from momify.plan.show import SEARCH_HEAD, search_rows

    found, plans = make_search(given, budget, speed)
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in plans], indent=2))
        return
    screen.table(f"{given.name} within {budget}", SEARCH_HEAD, search_rows(found, plans[0].source))
    for one in plans:
        typer.echo(one.line)
