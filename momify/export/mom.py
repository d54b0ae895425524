"""Export as `mom`: a folder that transformers loads by itself, the model's code lying beside its weights.

Its users need torch and transformers and pass trust_remote_code=True; they do not need momify.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from momify import model as model_package
from momify.convert.stored_mom import check_finite, impossible_config, model_class, open_mom
from momify.convert.weight_files import find_weight_files, inside, read_json
from momify.errors import MomifyError
from momify.export.card import model_card
from momify.export.folder import PROVENANCE, TEXTS, check_target, companions, provenance
from momify.files import whole_folder, write_json, write_text
from momify.model import MomConfig, MomForCausalLM, half_steps
from momify.model.config import OLDEST

AUTO_MAP = {
    "AutoConfig": "config.MomConfig",
    "AutoModel": "modeling.MomModel",
    "AutoModelForCausalLM": "modeling.MomForCausalLM",
    "AutoModelForSequenceClassification": "classification.MomForSequenceClassification",
}
COMPANIONS = (*TEXTS, "model.safetensors.index.json")
Json = dict[str, Any]


def export_mom(
    model_folder: Path, target: Path, report: Json | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the MoM in `model_folder` to `target`, whole or not at all, and return `target`.

    It holds weights, config with auto_map, the model's code, tokenizer, a model card (with the numbers of `report`,
    a report.json, if given) and momify.json. `say` gets what loads it, a line at a time. Raises MomifyError for a
    folder that is no complete MoM, and for a `target` that holds something else than an earlier export.
    """
    model_folder, target = Path(model_folder), Path(target)
    config = _read_config(model_folder)
    build = model_class(config)
    stored = open_mom(model_folder, build)
    check_finite(stored)
    check_target(model_folder, target)
    record = provenance(model_folder, "mom")
    with whole_folder(target) as folder:
        for path in [*find_weight_files(model_folder), *companions(model_folder, COMPANIONS), *code_files()]:
            shutil.copyfile(path, folder / path.name)
        write_json(folder / "config.json", {**config, "auto_map": AUTO_MAP})
        write_json(folder / PROVENANCE, record)
        write_text(folder / "README.md", model_card(config, record, report))
    say(f"loads where torch and transformers {OLDEST} or newer are, with trust_remote_code=True")
    if build is MomForCausalLM and not any(half.routed for half in half_steps(stored.config)):
        say("none of its steps chooses: --format gpt2 writes a plain GPT-2, which any GPT-2 tool loads")
    return target


def code_files() -> list[Path]:
    """The files that a MoM's code consists of, all in one flat folder."""
    folder = Path(model_package.__file__).parent
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def _read_config(folder: Path) -> Json:
    """config.json of a MoM, as it stands. Raises MomifyError for any other."""
    if not folder.is_dir():
        raise MomifyError(f"model folder {folder} does not exist; give a folder that momify convert or train wrote")
    path = inside(folder, "config.json")
    config = read_json(path)
    if config.get("model_type") != "mom":
        kind = config.get("model_type")
        raise MomifyError(f"{folder} holds a model of type {kind!r}, not 'mom'; convert it first")
    with impossible_config(path):  # also of what momify does not read, and transformers will
        MomConfig.from_dict(config)
    return config
