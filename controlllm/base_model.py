"""The base model, from wherever it is, as a plain Hugging Face directory with safetensors."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controlllm.base_facts import CARD, folder_facts, gguf_facts, keep_facts
from controlllm.config import ModelConfig
from controlllm.data.sources import source_files
from controlllm.errors import UserError
from controlllm.model_shape import Shape, model_shape

_ENDINGS = {".safetensors", ".json", ".model", ".txt", ".jinja"}
_LICENCES = ("LICENSE", "NOTICE")


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
        keep_facts(gguf_facts(files[0]), folder)
    elif files:
        _copy(files, folder)
        keep_facts(folder_facts(files[0].parent), folder)
    else:
        _download(model, folder)
        keep_facts(folder_facts(folder), folder)
        (folder / CARD).unlink(missing_ok=True)
    _check(folder, model.name)


def _local_files(name: str) -> list[Path]:
    if name.startswith("pkg://") or name.endswith(".gguf"):
        return source_files(name)
    place = Path(name).expanduser()
    if not place.is_dir():
        return []
    found = (f for f in place.iterdir() if f.suffix in _ENDINGS or f.name.startswith(_LICENCES))
    return sorted(f for f in found if f.is_file() and f.name != "lineage.json")


def _copy(files: list[Path], folder: Path) -> None:
    for file in files:
        shutil.copy2(file, folder / file.name)


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


def hub_shape(model: ModelConfig) -> Shape | None:
    """Of a Hugging Face id that is not on this machine yet: its config.json alone is downloaded, to the hub's cache."""
    from huggingface_hub import snapshot_download  # hf_hub_download would try for half a minute without a network

    with _explained(model):
        snapshot_download(model.name, revision=model.revision, allow_patterns="config.json")
    return model_shape(model.name, revision=model.revision)


def _download(model: ModelConfig, folder: Path) -> None:
    """Only safetensors, configuration and tokenizer files; without a network what the hub's cache has."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [f"*{ending}" for ending in sorted(_ENDINGS)] + [f"{name}*" for name in (*_LICENCES, CARD)]
    with _explained(model):
        try:
            hub_shape(model)  # known to every check from now on
            snapshot_download(model.name, revision=model.revision, local_dir=folder, allow_patterns=patterns)
        except LocalEntryNotFoundError:
            if (cached := model_shape(model.name, revision=model.revision)) is None:
                raise
            model_shape(str(cached.path))  # raises where weights or tokenizer are missing
            _copy(_local_files(str(cached.path)), folder)
            keep_facts(folder_facts(cached.path), folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


@contextmanager
def _explained(model: ModelConfig) -> Iterator[None]:
    """What the hub says, as one line with the way out."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "log in (hf auth login) or set HF_TOKEN"
    try:
        yield
    except GatedRepoError:
        said = f"is gated on the Hugging Face Hub: accept its terms on its page there, then {log_in}"
    except RepositoryNotFoundError:
        said = (
            f"is no folder here and not found on the Hugging Face Hub: check its spelling; if it is private, {log_in}"
        )
    except RevisionNotFoundError:
        said = f"has no revision '{model.revision}' on the Hugging Face Hub: check model.revision"
    except LocalEntryNotFoundError:
        said = (
            "is no folder here, and the Hugging Face Hub cannot be reached: download it where it can (hf download "
            f"{model.name}) and set model.name to the copy's folder, or bring the Hub's cache here (HF_HOME)"
        )
    except (HfHubHTTPError, OSError) as error:
        said = f"could not be had from the Hugging Face Hub ({str(error).splitlines()[0]})"
    else:
        return
    raise UserError(f"model.name: '{model.name}' {said}")


def _check(folder: Path, name: str) -> None:
    if not (folder / "config.json").exists():
        raise UserError(f"model.name: '{name}' has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model.name: '{name}' has no *.safetensors weights; convert it first (save_pretrained does)")
