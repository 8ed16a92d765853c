"""Is a model's folder all there: configuration, tokenizer, and every tensor in files whose headers are right."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlllm.errors import UserError

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_whole(folder: Path, files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model. files: by their names in the folder.

    UserError for the first that is missing, damaged, or too much.
    """
    from controlllm.control.tensor_files import read_header

    if "config.json" not in files:
        raise UserError(f"{folder}: has no config.json; is this a Hugging Face model folder?")
    config = read_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{folder / 'config.json'}: has no model_type; is this a model's?")
    if not files.keys() & set(TOKENIZERS):
        raise UserError(f"{folder}: has no tokenizer (tokenizer.json); save it there, too")
    weights = {name: read_header(path) for name, path in files.items() if path.suffix == ".safetensors"}
    model = {name: tensors for name, tensors in weights.items() if "/" not in name}
    if INDEX in files:
        _check_index(folder, model)
    elif not model:
        raise UserError(f"{folder}: has no weights (*.safetensors)")
    elif set(model) != {"model.safetensors"}:
        raise UserError(f"{folder}: has {len(model)} files of weights and no {INDEX}; save the model again")
    return {name: tensor.shape for tensors in model.values() for name, tensor in tensors.items()}


def _check_index(folder: Path, model: Mapping[str, Mapping[str, Any]]) -> None:
    index = read_object(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise UserError(f"{folder / INDEX}: has no weight_map; save the model again")
    for tensor, name in index.items():
        if name not in model:
            raise UserError(f"{folder / str(name)}: is missing, which {INDEX} names; make the checkpoint again")
        if tensor not in model[name]:
            raise UserError(f"{folder}: {name} lacks the tensor {tensor} that {INDEX} names; make the checkpoint again")
    if extra := sorted(set(model) - set(index.values())):
        raise UserError(f"{folder / extra[0]}: is not named by {INDEX}; move it elsewhere, then try again")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON: {error}; make the checkpoint again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold an object, found {type(values).__name__}")
    return values
