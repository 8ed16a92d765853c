"""The base model, from wherever it is, as a plain Hugging Face directory with safetensors."""

import shutil
from pathlib import Path
from typing import Any

from controlllm.config import ModelConfig
from controlllm.data.sources import source_files
from controlllm.errors import UserError


def source_stamp(model: ModelConfig) -> Any:
    """What would change if the model's files did: sizes and times of local files, the revision of a hub id."""
    if files := _local_files(model.name):
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return model.revision


def save_base(model: ModelConfig, folder: Path) -> None:
    """Write model and tokenizer into `folder`."""
    files = _local_files(model.name)
    if len(files) == 1 and files[0].suffix == ".gguf":
        _convert_gguf(files[0], folder)
    elif files:
        for file in files:
            shutil.copy2(file, folder / file.name)
    else:
        _download(model, folder)
    _check(folder, model.name)


def _local_files(name: str) -> list[Path]:
    if name.startswith("pkg://") or name.endswith(".gguf"):
        return source_files(name)
    place = Path(name).expanduser()
    if not place.is_dir():
        return []
    keep = {".safetensors", ".json", ".model", ".txt", ".jinja"}
    return sorted(f for f in place.iterdir() if f.is_file() and f.suffix in keep and f.name != "lineage.json")


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantised to float32. The class is built anew, because the loaded one keeps a quantization config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = type(loaded.config).from_dict(_without(loaded.config.to_dict(), "quantization_config", "_name_or_path"))
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _download(model: ModelConfig, folder: Path) -> None:
    """Only safetensors, configuration and tokenizer files; offline is a normal state."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        snapshot_download(model.name, revision=model.revision, local_dir=folder, allow_patterns=patterns)
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.name: '{model.name}' is no folder here and could not be had from the Hugging Face Hub ({reason})"
        ) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _check(folder: Path, name: str) -> None:
    if not (folder / "config.json").exists():
        raise UserError(f"model.name: '{name}' has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model.name: '{name}' has no *.safetensors weights; convert it first (save_pretrained does)")
