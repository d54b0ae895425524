"""The options of `momify convert`: what decides weights, what decides compute, and how the conversion goes about it."""

from typing import Annotated

import typer

Source = Annotated[str, typer.Argument(help="Hub name, folder or builtin:demo.", show_default=False)]
Mha = Annotated[int, typer.Option(help="Attention modules to keep: sets weights.", show_default=False)]
Ffn = Annotated[int, typer.Option(help="Feed-forward modules to keep: sets weights.", show_default=False)]
Depth = Annotated[int | None, typer.Option(help="Steps H; as the source if left out: sets compute.")]
TopK = Annotated[int, typer.Option(help="Modules per token and half-step, K: sets compute.")]
MhaSteps = Annotated[
    int | None,
    typer.Option(help="Steps that run attention: sets compute and KV cache; one per module if left out."),
]
FfnSteps = Annotated[
    int | None, typer.Option(help="Steps that run a feed-forward module: sets compute; one per module if left out.")
]
Reach = Annotated[
    str | None,
    typer.Option(help="What a running step may choose: all, skip (home or SKIP), home (if left out and K is 1)."),
]
Init = Annotated[str, typer.Option(help="home: start as the pruned source; random: the paper's start.")]
PatchRank = Annotated[
    int, typer.Option(min=0, help="Rank of the patch that SKIP adds in a removed half-layer's place; 0: none.")
]
StepRank = Annotated[
    int | None,
    typer.Option(min=0, help="Rank of each step's own change to a module that steps share; 16 if left out, 0: none."),
]
Merge = Annotated[
    bool | None,
    typer.Option(
        help="A module that steps share is made of all their layers, aligned; done with --step-rank if left out."
    ),
]
Refit = Annotated[bool, typer.Option(help="Kept modules are refitted to make up for what goes: a better start.")]
RefitRidge = Annotated[
    float, typer.Option(help="How strongly they hold on to their own weights: 30 trains best, 0.001 starts best.")
]
Budget = Annotated[
    float | None,
    typer.Option(help="Routers that spend this share of the MACs, token by token, on modules or patches; none."),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="What goes: trial (the best of three ways' choices after a short training; the default up to "
        "gpt2's size), cosine (block influence, no training), greedy by loss, fitted, layerdrop ..."
    ),
]
Calibration = Annotated[
    list[str] | None, typer.Option(help="Text on which importance is measured; Python's own library if left out.")
]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Name = Annotated[str | None, typer.Option(help="Name of the run; <model>-<mha>x<ffn> if left out.")]
Seed = Annotated[int, typer.Option(min=0)]
