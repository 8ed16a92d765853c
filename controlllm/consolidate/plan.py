"""What a model consists of, tensor by tensor: found and verified before anything is written."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controlllm.config import Method, ModelConfig
from controlllm.config.export import ExportConfig
from controlllm.consolidate.tensors import NAMES, Blended, Cast, Held, is_number, read
from controlllm.control.expand import settings_of
from controlllm.control.fold import plain_config
from controlllm.control.spelling import FROZEN, base_name, pair_names
from controlllm.control.tensor_files import DTYPES, Source, StoredTensor, read_header
from controlllm.train.trained import require_same_run
from controlllm.train.weight_files import Converted
from controlllm.train.weights import empty_model

Sources = Mapping[str, Source]


@dataclass(frozen=True)
class Plan:
    """A model that can be written."""

    config: Any
    generation_config: Any
    tensors: dict[str, Source]
    """What is written, by name in the model."""
    taken: dict[Path, list[str]]
    """Files of the base that are part of the model as they are, and the names in them."""


def plan_run(
    base: Path, method: Method, trained: Sources, export: ExportConfig, *, place: Path, alphas: Callable[[Any], Any]
) -> Plan:
    """What `trained` makes of the base.

    place: where it is from, for messages. alphas: (model with real interpolations) → weight of each twin by base layer;
    called for a folded form. Raises Converted where transformers makes other tensors of the base's than its files hold,
    and UserError as `empty_model`, and where a tensor is missing, unexpected or misshapen.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    model = empty_model(base, ModelConfig(name=str(base), attention="eager"), method)  # of a row that is not packed
    found = model.sources
    if found.stored is None:
        raise Converted(found.whole_because)
    if get_model_conversion_mapping(model, add_legacy=False):
        raise Converted(f"{base}: transformers gives its tensors other names while it loads")
    require_same_run(place, {name: source.shape for name, source in trained.items()}, model)
    headers = {file: read_header(file) for file in {stored.file for stored in found.stored.values()}}
    own = {id(parameter): trained[name] for name, parameter in model.named_parameters() if name in trained}
    fill_interpolations(model, trained)
    tensors: dict[str, Source] = {}
    for name, tensor in untied(model).items():
        origin = found.origins.get(name)
        if id(tensor) in own:
            tensors[name] = own[id(tensor)]
        elif origin is None:
            tensors[name] = Held(tensor.detach())
        else:
            assert not origin.zero, f"{name} is of a stacked copy, which is trained"
            stored = found.stored[origin.name]
            tensors[name] = headers[stored.file][stored.key]
    return arrange(model, tensors, headers, export, alphas=alphas)


def fill_interpolations(model: Any, tensors: Sources) -> None:
    """Give the interpolations of a model without weights their values."""
    for name, parameter in model.named_parameters():
        if ".interpolation." in name and name in tensors:
            torch.utils.swap_tensors(parameter, nn.Parameter(read(tensors[name]), parameter.requires_grad))


def untied(model: Any) -> dict[str, Any]:
    """The state dict with one name for tied tensors: that which `save_pretrained` keeps."""
    state = model.state_dict(keep_vars=True)
    tied = {name for name in model.all_tied_weights_keys if name in state}
    kept = {id(tensor) for name, tensor in state.items() if name not in tied}
    return {name: tensor for name, tensor in state.items() if name not in tied or id(tensor) not in kept}


def arrange(
    model: Any,
    tensors: dict[str, Source],
    base: Mapping[Path, Mapping[str, StoredTensor]],
    export: ExportConfig,
    *,
    alphas: Callable[[Any], Any],
) -> Plan:
    """The form, the dtypes, and which of the base's files are taken. base: files and what they hold."""
    config, pairs = model.config, pair_names(model)
    if export.form == "folded" and pairs:
        chosen = alphas(model)
        tensors = folded(tensors, dict(zip(pairs, _in_order(model, chosen), strict=True)))
        config, pairs = plain_config(config), []
        config.lineage = {"folded": [{"alphas": chosen}]}
    dtype = export_dtype(export, [t for file in base.values() for t in file.values()] or tensors.values())
    kept = kept_in_float32(model, dtype)
    written = {
        name: as_dtype(source, "F32" if kept(base_name(name, pairs)) else dtype) for name, source in tensors.items()
    }
    taken = _taken(written, base, pairs, tied=model.all_tied_weights_keys) if export.frozen == "link" else {}
    gone = {id(base[file][key]) for file, keys in taken.items() for key in keys}
    config.use_cache, config.dtype = True, str(DTYPES[dtype]).removeprefix("torch.")
    return Plan(config, model.generation_config, {n: s for n, s in written.items() if id(s) not in gone}, taken)


def export_dtype(export: ExportConfig, base: Iterable[Source]) -> str:
    """As safetensors files call it."""
    if export.dtype != "base":
        return {"float32": "F32", "bfloat16": "BF16"}[export.dtype]
    sizes: Counter[str] = Counter()
    for tensor in filter(is_number, base):
        sizes[tensor.dtype] += tensor.size
    return sizes.most_common(1)[0][0]


def as_dtype(source: Source, dtype: str) -> Source:
    """Numbers stay as they are where whoever reads them as `dtype` has the same."""
    exact = dtype == "F32" and source.dtype in ("BF16", "F16")
    return source if source.dtype == dtype or exact or not is_number(source) else Cast(source, dtype)


def folded(tensors: Sources, alphas: Mapping[str, float]) -> dict[str, Source]:
    """Each pair as one block. alphas: of the twin, by the pair's name."""
    made: dict[str, Source] = {}
    for name, source in tensors.items():
        pair = next((pair for pair in alphas if name.startswith(f"{pair}.")), None)
        if pair is None:
            made[name] = source
        elif name.startswith(f"{pair}.{FROZEN}"):
            twin = tensors[name.replace(f"{pair}.{FROZEN}", f"{pair}.expanded.", 1)]
            made[base_name(name, [pair])] = Blended(source, twin, alphas[pair]) if is_number(source) else source
    return made


def _in_order(model: Any, alphas: Mapping[int, float]) -> list[float]:
    settings = settings_of(model)
    assert settings is not None
    return [alphas[site] for site in settings.paired_sites]


def kept_in_float32(model: Any, dtype: str) -> Callable[[str], bool]:
    """What an architecture does not want narrower, by the base's name."""
    plan = model._get_dtype_plan(DTYPES[dtype])
    patterns = [pattern.replace("*", ".*") for pattern, kept in plan.items() if NAMES[kept] == "F32"]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _taken(
    written: Sources, base: Mapping[Path, Mapping[str, StoredTensor]], pairs: Iterable[str], *, tied: Iterable[str]
) -> dict[Path, list[str]]:
    """The base's files of which every tensor is in the model as it is, under its own name or as a pair's frozen one."""
    pairs = list(pairs)
    by_base_name = {base_name(name, pairs): source for name, source in written.items()}
    return {
        file: list(base[file])
        for file in sorted(base)
        if any(by_base_name.get(key) is tensor for key, tensor in base[file].items())
        and all(by_base_name.get(key) is tensor or key in tied for key, tensor in base[file].items())
    }
