"""Stage 4: base and trained tensors to one Hugging Face directory."""

import shutil
from pathlib import Path
from typing import Any

from controlllm import __version__
from controlllm.base_facts import folder_facts
from controlllm.config import Method, ModelConfig
from controlllm.fingerprint import content_of
from controlllm.store import Output, content_hash, find_lineage, read_lineage, run_stage


def consolidate(base: Path, trained: Path, method: Method) -> Output:
    """Everything `AutoModelForCausalLM.from_pretrained` needs, for twins after `import controlllm`, and nothing else.

    In float32. Adapters are merged, so that the model is a plain one; they are kept in `adapter/`, as PEFT reads them.
    Adapters of twins make the twin a full one, and the model an ordinary expanded one; PEFT has no form for them alone.
    What merging cost stands in config.json, under `lineage.merge`. Weights that were quantised for training are written
    as the plain numbers they stood for, because that is what was trained against; `lineage.quantization` says so.
    """

    def build(folder: Path) -> None:
        from transformers import AutoTokenizer, GenerationConfig

        model = _trained_model(base, trained, method)
        tokenizer = AutoTokenizer.from_pretrained(base)
        model.config.lineage = _lineage(base, trained)
        if method.quantization:
            model.config.lineage["quantization"] = method.quantization.model_dump()
        if method.lora or method.ia3:
            from controlllm.merging import merge
            from controlllm.train.adapters import save_adapter

            if not method.control:
                save_adapter(model, folder / "adapter", base_name=_model_name(base))
            model.config.lineage["merge"] = merge(model, tokenizer)
        if method.prompt:
            from controlllm.train.prompt import detach
            from controlllm.train.prompt_files import save_prompt

            save_prompt(detach(model), model.config, folder / "adapter", base_name=_model_name(base))
        model.config.use_cache = True
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (base / "generation_config.json").exists():
            GenerationConfig.from_pretrained(base).save_pretrained(folder)
        _copy_licences(base, folder)

    parents = {"ingest model": base, "train": trained}
    return run_stage("consolidate", config=dict(method), parents=parents, build=build)


def _trained_model(base: Path, trained: Path, method: Method) -> Any:
    from controlllm.train.model import load_model
    from controlllm.train.trained import load_trained

    model = load_model(base, ModelConfig(name=str(base), attention="eager"), method)  # of a row that is not packed
    load_trained(trained / "trained.safetensors", model)
    if method.quantization:
        from controlllm.train.quantize import dequantise_

        dequantise_(model)
    return model


def _lineage(base: Path, trained: Path) -> dict[str, Any]:
    """Where the weights come from, inside the checkpoint itself: base model, data, training, code. No paths."""
    training = read_lineage(trained)
    inputs = training["inputs"]
    return {
        "base_model": _model_name(base),
        "base_content": content_hash(base),
        "base": folder_facts(base),
        "data": {
            "content": training["parents"]["prepare"]["content"],
            "datasets": sorted(_starting(inputs, "mix.shares.")),
        },
        "training": {"key": training["key"], "content": training["content"]},
        "code": {"controlllm": __version__, "train": content_of(_starting(inputs, "code "))}
        | _starting(inputs, "version of "),
    }


def _model_name(base: Path) -> str:
    """As the recipe names it; of a folder its own name only."""
    name = ((find_lineage(base) or {}).get("inputs") or {}).get("model.name", base.name)
    place = Path(name).expanduser()
    return place.name if "://" not in name and (place.is_absolute() or place.exists()) else name


def _starting(inputs: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}


def _copy_licences(base: Path, folder: Path) -> None:
    for file in [*base.glob("LICENSE*"), *base.glob("NOTICE*")]:
        shutil.copy2(file, folder / file.name)
