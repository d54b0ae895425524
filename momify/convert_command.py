"""`momify convert`: its options, by what they decide, and what it does with them. Heavy imports stay inside."""

from typing import Annotated

import typer

from momify.terminal import Overwrite, Quiet, open_screen

KEPT, RUNS, START = "What is kept: sets weights", "What runs: sets compute", "How it starts: sets quality"

Source = Annotated[str, typer.Argument(help="Hub name, folder or builtin:demo.", show_default=False)]
Mha = Annotated[int, typer.Option(rich_help_panel=KEPT, help="Attention modules to keep.", show_default=False)]
Ffn = Annotated[int, typer.Option(rich_help_panel=KEPT, help="Feed-forward modules to keep.", show_default=False)]
Depth = Annotated[int | None, typer.Option(rich_help_panel=RUNS, help="Steps H; as the source if left out.")]
TopK = Annotated[int, typer.Option(rich_help_panel=RUNS, help="Modules per token and half-step, K.")]
MhaSteps = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=RUNS, help="Steps that run attention, each with its KV cache; one per module if left out."
    ),
]
FfnSteps = Annotated[
    int | None,
    typer.Option(rich_help_panel=RUNS, help="Steps that run a feed-forward module; one per module if left out."),
]
Reach = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=RUNS,
        help="What a running step may choose: all, skip (home or SKIP), home (if left out and K is 1).",
    ),
]
Init = Annotated[
    str, typer.Option(rich_help_panel=START, help="home: start as the pruned source; random: the paper's start.")
]
PatchRank = Annotated[
    int,
    typer.Option(
        rich_help_panel=START, min=0, help="Rank of the patch that SKIP adds in a removed half-layer's place; 0: none."
    ),
]
StepRank = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=START,
        min=0,
        help="Rank of each step's own change to a module that steps share; 16 if left out, 0: none.",
    ),
]
Merge = Annotated[
    bool | None,
    typer.Option(
        rich_help_panel=START,
        help="A module that steps share is made of all their layers, aligned; done with --step-rank if left out.",
    ),
]
Refit = Annotated[
    bool,
    typer.Option(rich_help_panel=START, help="Kept modules are refitted to make up for what goes: a better start."),
]
RefitRidge = Annotated[
    float,
    typer.Option(
        rich_help_panel=START, help="How strongly they hold on to their own weights: 30 trains best, 0.001 starts best."
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=RUNS,
        help="Routers that spend this share of the MACs, token by token, on modules or patches; none if left out.",
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=START,
        help="What goes: trial (the best of three ways' choices after a short training; the default up to "
        "gpt2's size), cosine (block influence, no training), greedy by loss, fitted, layerdrop, leave_one_out, "
        "magnitude, every_other",
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(rich_help_panel=START, help="Text on which importance is measured; Python source if left out."),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Name = Annotated[str | None, typer.Option(help="Name of the run; <model>-<mha>x<ffn> if left out.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all that is drawn.")]


def convert(
    model: Source,
    mha: Mha,
    ffn: Ffn,
    depth: Depth = None,
    top_k: TopK = 1,
    mha_steps: MhaSteps = None,
    ffn_steps: FfnSteps = None,
    reach: Reach = None,
    init: Init = "home",
    patch_rank: PatchRank = 0,
    step_rank: StepRank = None,
    merge: Merge = None,
    refit: Refit = True,
    refit_ridge: RefitRidge = 30.0,
    budget: Budget = None,
    importance: Importance = None,
    calibration: Calibration = None,
    revision: Revision = None,
    name: Name = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Take a GPT-2 checkpoint apart and assemble the MoM; says what it removes first. Writes runs/<name>/model/."""
    screen = open_screen(quiet)
    from momify.conversion import convert as convert_source
    from momify.pipeline import check
    from momify.recipe import make_recipe
    from momify.runs import opened_run
    from momify.subject import context_length, model_name

    mom = {"mha": mha, "ffn": ffn, "depth": depth, "modules_per_token": top_k, "mha_steps": mha_steps,
           "ffn_steps": ffn_steps, "reach": reach, "init": init, "patch_rank": patch_rank,
           "step_rank": step_rank, "merge": merge, "budget": budget, "importance": importance,
           "refit_modules": refit, "refit_ridge": refit_ridge}  # fmt: skip
    length = context_length(model, revision, screen)
    data = {
        "run": {"name": name or f"{model_name(model)}-{mha}x{ffn}", "seed": seed},
        "source": {"model": model, "revision": revision},
        "mom": mom,
        "data": {"train": calibration or ["builtin:demo"], "block_length": length},
    }
    recipe = make_recipe(data, "command line")
    check(recipe, screen)
    with opened_run(recipe, resume=False, overwrite=overwrite) as folder:
        screen.to_log(folder.log)
        convert_source(recipe, folder, screen)
    screen.say(f"next: momify train {folder.recipe_file} data.train=YOUR_TEXT.txt, then momify report")
    screen.result(folder.model)
