"""Checkpoints of the prior implementation (linkedin/ControlLLM, and the ControlLLM/* models), as ours.

They give the same logits, losses and gradients as there, with these differences:

* slerp: the prior code went over to a line for the whole batch as soon as one token's outputs were parallel; here each
  token decides for itself.
* loss type dot: its magnitude term was always 0, so it is imported as what it was, half of cosine.
* loss type attention: the prior code averaged over the keys, ours is the Kullback-Leibler sum over them.
"""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from controlllm.control.expand import freeze
from controlllm.control.model import as_expanded, family
from controlllm.control.reference_config import PriorConfig, base_family, base_names, our_config, read_json
from controlllm.control.settings import ControlSettings
from controlllm.control.tensor_files import DTYPES, StoredTensor, read_header, write
from controlllm.errors import UserError
from controlllm.fingerprint import content_of, hash_file
from controlllm.progress import track

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Ours → theirs.
PARAMETERS = {
    "alpha_logit": "interpolation_factor",
    "gate_weight": "interp_weight.fc.weight", "gate_bias": "interp_weight.fc.bias",
    "router_weight": "gating.gate_network.0.weight", "router_bias": "gating.gate_network.0.bias",
}  # fmt: skip
MAPS = {"proj": "linear_proj.weight", "prog": "lateral_connection.weight"}
MEGABYTE = 10**6


def load(path: str | Path, *, base_family: str | None = None, alpha_scale: float = 1.0) -> PreTrainedModel:
    """The expanded model, in evaluation mode, frozen as it is to be trained, in the dtypes of its files.

    `base_family` is transformers' model type, for a checkpoint that does not tell. UserError as `import_reference`.
    """
    prior = _read(Path(path), base_family)
    config = prior.config
    config.control = replace(prior.settings, alpha_scale=alpha_scale).to_dict()
    weights = {name: tensor.read() for name, tensor in prior.tensors.items()}
    model: Any = family(config.base_model_type).causal_lm.from_pretrained(
        None,
        config=config,
        state_dict=dict(weights),
        dtype=_most(prior.tensors.values()),
        attn_implementation="eager" if prior.settings.divergence == "attention" else None,
    )
    for name, parameter in model.named_parameters():
        if name in weights and parameter.dtype != weights[name].dtype:
            parameter.data = weights[name]
    as_expanded(model, model.config)
    freeze(model)
    if (prior.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(prior.folder)
    return model.eval()


def import_reference(source: str | Path, target: str | Path, *, base_family: str | None = None) -> Path:
    """Write the checkpoint into the new folder `target`, in little memory; returns the folder.

    UserError, before anything is written, where a file, setting or tensor is not as the prior format has it.
    """
    target = Path(target).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already; name a new folder")
    prior = _read(Path(source), base_family)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        hashes = _write_shards(prior, partial)
        prior.config.lineage = _lineage(prior, hashes)
        prior.config.save_pretrained(partial)
        for file in _companions(prior.folder):
            shutil.copyfile(file, partial / file.name)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


@dataclass(frozen=True)
class _Prior:
    """A checkpoint that was found to be whole."""

    folder: Path
    source: PriorConfig
    config: PreTrainedConfig
    settings: ControlSettings
    shards: dict[Path, dict[str, StoredTensor]]
    """By our names."""

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.items()}


def _read(folder: Path, asked: str | None) -> _Prior:
    file = folder / "config.json"
    source = PriorConfig(file, read_json(file))
    settings = source.settings()
    shards = {shard: read_header(shard) for shard in _weight_files(folder)}
    found: dict[str, StoredTensor] = {}
    for shard in shards.values():
        for name, tensor in shard.items():
            if name in found:
                raise UserError(f"{tensor.file}: tensor {name} is in {found[name].file.name} too; remove one of them")
            found[name] = tensor
    kind = base_family(source.values, found, asked=asked, file=file)
    config = our_config(source.values, kind, settings, file=file)
    if config.dtype is None:
        config.dtype = _most(found.values())
    ours = _our_names(folder, config, found)
    named = {
        file: {ours[name]: _as_ours(ours[name], tensor) for name, tensor in shard.items()}
        for file, shard in shards.items()
    }
    return _Prior(folder, source, config, settings, named)


def _weight_files(folder: Path) -> list[Path]:
    files, index = sorted(folder.glob("*.safetensors")), folder / INDEX
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or any(Path(str(name)).name != name for name in places.values()):
            raise UserError(f"{index}: has no weight_map of tensors and files beside it; download it again")
        files = [folder / name for name in sorted(set(places.values()))]
    elif folder / SINGLE in files:
        files = [folder / SINGLE]
    elif len(files) > 1:
        raise UserError(f"{folder}: {len(files)} *.safetensors without {INDEX}; download that too")
    if not files and (pickled := [file for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)]):
        raise UserError(
            f"{pickled[0]}: pickled weights can run code and are not read; convert them to safetensors first"
        )
    if not files:
        raise UserError(f"{folder}: has no *.safetensors")
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: not found, but {INDEX} names it; download it too")
    return files


def _our_names(folder: Path, config: Any, found: dict[str, StoredTensor]) -> dict[str, str]:
    """Theirs → ours; UserError where names or shapes are not those of the model that the config describes."""
    with torch.device("meta"):
        model: Any = family(config.base_model_type).causal_lm(config)
    wanted = {prior_name(name, config.control): (name, tuple(t.shape)) for name, t in model.state_dict().items()}
    tied = model.all_tied_weights_keys
    for name, (ours, shape) in wanted.items():
        if name not in found and ours not in tied:
            raise UserError(f"{folder}: tensor {name} is missing; is it a {config.base_model_type} (--base-family)?")
        if name in found and found[name].shape != shape:
            has = f"{found[name].file}: tensor {name} has shape {list(found[name].shape)}"
            raise UserError(f"{has}, config.json makes it {list(shape)}; one of the two is of another model")
    if unexpected := [name for name in found if name not in wanted]:
        says = f"not of a {config.base_model_type} with this expansion; is the base another (--base-family)?"
        raise UserError(f"{found[unexpected[0]].file}: tensor {unexpected[0]} is {says}")
    return {name: ours for name, (ours, _) in wanted.items() if name in found}


def prior_name(ours: str, control: dict[str, Any]) -> str:
    """Their name of a tensor of ours."""
    if not (match := re.fullmatch(r"(.*\.layers\.\d+\.)(frozen|expanded|interpolation)\.(.*)", ours)):
        return ours
    layer, part, rest = match.groups()
    if part == "interpolation":
        return layer + (MAPS[control["interpolation"]] if rest == "map_delta" else PARAMETERS[rest])
    if part == "frozen":
        return f"{layer}pretrained_layer.{rest}"
    rest = re.sub(r"^([^.]*norm)\.norm\.", r"\1.", rest)
    return f"{layer}expanded_layer.{rest.replace('.relaxation_logit', '.interpolation_factor')}"


def _as_ours(name: str, tensor: StoredTensor) -> StoredTensor:
    return replace(tensor, change=minus_identity) if name.endswith(".interpolation.map_delta") else tensor


def minus_identity(matrix: Tensor) -> Tensor:
    """M - I in float32: only the diagonal changes."""
    matrix.diagonal().copy_(matrix.diagonal().float() - 1)
    return matrix


def _write_shards(prior: _Prior, folder: Path) -> dict[str, str]:
    """Returns the hashes of the source's files."""
    total, done, shown, hashes = sum(tensor.size for tensor in prior.tensors.values()), 0, 0, {}
    sharded = len(prior.shards) > 1
    with track("import", total=math.ceil(total / MEGABYTE), unit="MB") as advance:
        for file, tensors in prior.shards.items():
            for size in write(folder / (file.name if sharded else SINGLE), tensors):
                done += size
                if shown < (shown := math.ceil(done / MEGABYTE)):
                    advance(shown)
            hashes[file.name] = hash_file(file)
    if sharded:
        places = {name: file.name for file, tensors in prior.shards.items() for name in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return hashes


def _lineage(prior: _Prior, hashes: dict[str, str]) -> dict[str, Any]:
    """Where the weights come from, inside the checkpoint itself."""
    hashes["config.json"] = hash_file(prior.folder / "config.json")
    lineage = {
        "imported_from": prior.folder.resolve().name,
        **{key.lstrip("_"): name for key, name in base_names(prior.source.values).items()},
        "tensors": len(prior.tensors),
        "source_content": content_of(hashes),
    }
    return lineage | ({"also_trained": also} if (also := prior.source.also_trained) else {})


def _companions(folder: Path) -> Iterator[Path]:
    """Tokenizer, generation settings, chat template and licences."""
    for pattern in ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"):
        for file in folder.glob(pattern):
            if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
                yield file


def _most(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype of the most bytes."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size
    return DTYPES[sizes.most_common(1)[0][0]]
