"""What a converted model has to choose and to learn, as far as a recipe tells: before hours go into converting it.

The source's layers are known only where the recipe trains it; what hangs on them otherwise is let pass here, and found
by the training. convert/homes.py decides what is told ahead here. No torch.
"""

from momify.recipe_blocks import MomBlock, TrainBlock


def check_training(mom: MomBlock, train: TrainBlock, layers: int | None) -> None:
    """Raise ValueError where training asks for choices, or for additions, that no such model has.

    layers: of the source, None where the recipe does not tell.
    """
    for key in ("supervise", "budget"):
        if (value := getattr(train, key)) and not may_fork(mom, layers):
            raise ValueError(
                f"train.{key} {value:g} needs half-steps that choose between home and SKIP, and this mom block makes "
                f"none; set mom.reach skip or mom.budget, or leave train.{key} out"
            )
    if train.stand_ins_first and not may_add(mom, train, layers):
        raise ValueError(
            f"train.stand_ins_first {train.stand_ins_first:g} teaches patches, step deltas and taught routers alone at "
            "first, and this mom block makes none; set mom.patch_rank where half-layers go, or leave it out"
        )


def may_fork(mom: MomBlock, layers: int | None) -> bool:
    """Whether a half-step may choose between one module and SKIP alone."""
    reaches = possible_reaches(mom, layers)
    return "skip" in reaches or ("all" in reaches and 1 in (mom.mha, mom.ffn))


def may_add(mom: MomBlock, train: TrainBlock, layers: int | None) -> bool:
    """Whether conversion may add what train.stand_ins_first teaches: patches, step deltas, routers that learn."""
    reaches = possible_reaches(mom, layers)
    explores = train.explore and not (train.budget or mom.budget)
    taught = mom.modules_per_token > 1 or train.supervise or train.balance or explores
    if reaches != {"home"} and (taught or mom.patch_rank):
        return True
    return "home" in reaches and (_may_patch(mom, layers) or _has_deltas(mom))


def possible_reaches(mom: MomBlock, layers: int | None) -> set[str]:
    """What a step that runs may choose: more than one answer where it hangs on the source's layers."""
    if mom.budget is not None:
        return {"skip"}
    if mom.reach is not None:
        return {mom.reach}
    if mom.modules_per_token > 1 or mom.init == "random" or _leaves_modules_out(mom):
        return {"all"}
    most = max(mom.mha, mom.ffn)  # no source has fewer layers
    if mom.depth is None or mom.depth <= (layers or most):
        return {"home"}
    return {"all"} if layers else {"all", "home"}


def _leaves_modules_out(mom: MomBlock) -> bool:
    """Whether fewer steps run than there are modules, so that each must be within reach of several."""
    for modules, asked in ((mom.mha, mom.mha_steps), (mom.ffn, mom.ffn_steps)):
        steps = asked if asked is not None else mom.depth  # without added steps, one a module as far as there are steps
        if steps is not None and steps < modules:
            return True
    return False


def _may_patch(mom: MomBlock, layers: int | None) -> bool:
    """Whether a step without a choice may only skip, where each step that runs has its home alone."""
    depth = mom.depth or layers
    steps = (
        mom.mha if mom.mha_steps is None else mom.mha_steps,
        mom.ffn if mom.ffn_steps is None else mom.ffn_steps,
    )
    return bool(mom.patch_rank) and (depth is None or min(steps) < depth)


def _has_deltas(mom: MomBlock) -> bool:
    """Whether steps share a module as their one home, and may differ in it."""
    shared = (mom.mha_steps or 0) > mom.mha or (mom.ffn_steps or 0) > mom.ffn
    return shared and mom.step_rank != 0
