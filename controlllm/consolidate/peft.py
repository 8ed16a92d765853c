"""An adapter of PEFT, merged into its base: through the model in memory, by PEFT itself, in float32."""

from pathlib import Path
from typing import Any

from controlllm.config.export import ExportConfig
from controlllm.consolidate.companions import base_lineage, load_tokenizer, save_companions
from controlllm.consolidate.whole import save_model
from controlllm.control.reference_config import read_json
from controlllm.control.tensor_files import read_header
from controlllm.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base_of(source: Path, given: Path | None) -> Path:
    """The folder of the adapter's base. UserError where neither --base nor the adapter names one that is here."""
    named = read_json(source / CONFIG).get("base_model_name_or_path")
    if given is not None:
        return given
    if isinstance(named, str) and (Path(named) / "config.json").is_file():
        return Path(named)
    raise UserError(f"{source}: its base model ({named}) is no folder here; name it with --base")


def write_merged(source: Path, base: Path, how: ExportConfig, folder: Path) -> None:
    """UserError where weights are missing or pickled, do not fit the base, or cannot be merged (virtual tokens)."""
    import torch
    from transformers import AutoModelForCausalLM

    weights = source / WEIGHTS
    if not weights.is_file():
        pickled = next(source.glob("adapter_model.*"), None)
        why = "is pickled and may run code; convert it to safetensors" if pickled else "not found: half an adapter"
        raise UserError(f"{pickled or weights}: {why}")
    read_header(weights)
    loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = _merged(loaded, source, base)
    merged.config.lineage = base_lineage(base) | {"training": {"checkpoint": source.name, "kind": "peft"}}
    save_model(merged, folder, how, base)
    tokenizer = load_tokenizer(source) or load_tokenizer(base)
    save_companions(folder, base, config=merged.config, generation_config=merged.generation_config, tokenizer=tokenizer)


def _merged(loaded: Any, source: Path, base: Path) -> Any:
    import warnings

    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted = PeftModel.from_pretrained(loaded, str(source))
    except (RuntimeError, ValueError, KeyError, TypeError, UserWarning) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{source}: does not fit {base}: {said[:300]}; is it another base (--base)?") from None
    if adapted.active_peft_config.is_prompt_learning:
        raise UserError(f"{source}: has virtual tokens, which no weight can hold; load it with PEFT beside its base")
    return adapted.merge_and_unload()  # type: ignore[operator] - of a tuner
