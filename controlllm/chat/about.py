"""What a checkpoint is, in a line."""

from pathlib import Path
from typing import Any

from controlllm.chat.places import Adapter, Model, Place, Trained
from controlllm.control.settings import ControlSettings
from controlllm.whole import read_object

Json = dict[str, Any]
PEFT_NAMES = {"PROMPT_TUNING": "prompt tuning", "PREFIX_TUNING": "prefix tuning"}


def describe(place: Place) -> str:
    """Its name, family and method: `demo/model · llama · Control LLM (concat-lerp, twins at 4, 9)`."""
    match place:
        case Model(folder):
            config = place.config
            family, method = config.get("base_model_type", config.get("model_type")), _method_of(config)
        case Trained(base=base):
            family, method = read_object(base / "config.json").get("model_type"), _method_in_training(place)
        case Adapter(folder, base):
            family = read_object(base / "config.json").get("model_type")
            kind = str(read_object(folder / "adapter_config.json").get("peft_type"))
            method = f"{PEFT_NAMES.get(kind, kind)} on {_name(base)}"
    return f"{_name(place.folder)} · {family} · {method}"


def _name(folder: Path) -> str:
    """The last two parts, without the dot of a folder that is still being made."""
    return "/".join(part.removeprefix(".") for part in folder.absolute().parts[-2:])


def _method_of(config: Json) -> str:
    lineage = config.get("lineage") or {}
    of = f" of {lineage['base_model']}" if lineage.get("base_model") else ""
    if lineage.get("folded"):
        return f"folded{of}"
    if config.get("control"):
        return _twins(config["control"]) + of
    if prompt := config.get("prompt"):
        return f"{prompt['kind']} tuning, {prompt['num_virtual_tokens']} virtual tokens{of}"
    if "merge" in lineage:
        return f"merged adapters{of}"
    return f"fine-tuned{of}" if of else "plain model"


def _twins(control: Json) -> str:
    settings = ControlSettings.from_dict(control)
    how = settings.layout if settings.layout == "stack" else f"{settings.layout}-{settings.interpolation}"
    return f"Control LLM ({how}, sites {', '.join(map(str, settings.sites))})"


def _method_in_training(place: Trained) -> str:
    method = place.method
    step = "" if place.step is None else f", step {place.step:,}"
    if method.control:
        twin = "" if method.control.twin == "full" else f" of {method.adapters}"
        return f"Control LLM ({method.control.layout}-{method.control.interpolation}, twins{twin}){step}"
    if method.prompt:
        return f"{method.prompt.kind} tuning, {method.prompt.num_virtual_tokens} virtual tokens{step}"
    return (method.adapters or ("partial fine-tuning" if method.partial else "full fine-tuning")) + step
