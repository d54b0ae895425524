"""`import momify` and transformers' Auto classes, in either order, each in a fresh Python."""

import subprocess
import sys

import pytest

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
def test_auto_classes_know_mom(imports: str, check: str, printed: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", f"{imports}; {check}"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == printed, done.stderr


@pytest.mark.parametrize(
    "first", ["PreTrainedModel", "GenerationMixin", "AutoModelForCausalLM", "Trainer", "DynamicCache"]
)
def test_whatever_is_imported_first(first: str) -> None:
    """transformers' modules import each other in many orders; none may meet the model half-way."""
    code = f"import momify; from transformers import {first}; from transformers import AutoConfig; {CHECK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MomConfig"], done.stderr


def test_names_are_there_and_others_are_not() -> None:
    import momify

    assert momify.MomConfig.model_type == "mom"
    assert issubclass(momify.MomifyError, Exception)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = momify.nothing_here
