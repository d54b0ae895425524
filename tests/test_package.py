"""`import momify` and transformers' Auto classes, in either order, each in a Python that has seen neither."""

from collections.abc import Callable
from pathlib import Path

import pytest

# What transformers imports itself, none of which imports transformers: most of the seconds.
BEFORE = (
    "import datasets, scipy.optimize, torch, torch._dynamo, torch.distributed.tensor, torch.export\n"
    "assert not {'momify', 'transformers'} & set(sys.modules)"
)
CHECK = (
    "c = AutoConfig.for_model('mom', vocab_size=61, hidden_size=32, num_attention_heads=4, intermediate_size=64,"
    "bos_token_id=0, eos_token_id=0); print(type(c).__name__)"
)
MODEL = "print(type(AutoModelForCausalLM.from_config(c)).__name__)"


@pytest.mark.parametrize(
    ("imports", "check", "printed"),
    [
        ("import momify; from transformers import AutoConfig", CHECK, ["MomConfig"]),
        ("from transformers import AutoConfig; import momify", CHECK, ["MomConfig"]),
        (
            "import momify; from transformers import AutoConfig, AutoModelForCausalLM",
            f"{CHECK}; {MODEL}",
            ["MomConfig", "MomForCausalLM"],
        ),
        (
            "from transformers import AutoModelForCausalLM, AutoConfig; import momify",
            f"{CHECK}; {MODEL}",
            ["MomConfig", "MomForCausalLM"],
        ),
        ("import momify.model; from transformers import AutoConfig", CHECK, ["MomConfig"]),
    ],
)
def test_auto_classes_know_mom(imports: str, check: str, printed: list[str], forking: Callable, tmp_path: Path) -> None:
    done = forking(BEFORE).run(f"{imports}; {check}", tmp_path)
    assert done.out.split() == printed, done.err


@pytest.mark.parametrize(
    "first", ["PreTrainedModel", "GenerationMixin", "AutoModelForCausalLM", "Trainer", "DynamicCache"]
)
def test_whatever_is_imported_first(first: str, forking: Callable, tmp_path: Path) -> None:
    """transformers' modules import each other in many orders; none may meet the model half-way."""
    code = f"import momify; from transformers import {first}; from transformers import AutoConfig; {CHECK}"
    done = forking(BEFORE).run(code, tmp_path)
    assert done.out.split() == ["MomConfig"], done.err


def test_names_are_there_and_others_are_not() -> None:
    import momify

    assert momify.MomConfig.model_type == "mom"
    assert issubclass(momify.MomifyError, Exception)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = momify.nothing_here
