"""Which model a checkpoint of named tensors is of, by a config.json, and its tensors under that model's names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlllm.config.export import ExportConfig
from controlllm.consolidate.alphas import alphas_for
from controlllm.consolidate.companions import load_tokenizer
from controlllm.consolidate.plan import Plan, arrange, fill_interpolations, untied
from controlllm.consolidate.tensors import Changed
from controlllm.control.reference import minus_identity, prior_name
from controlllm.control.reference_config import PriorConfig, base_family, our_config, read_json
from controlllm.control.spelling import base_name, pair_names
from controlllm.control.tensor_files import Source, StoredTensor, read_header
from controlllm.errors import UserError

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("", "model.", "module.", "state.model.", "app.model.", "state_dict.", "base_model.model.")
"""Under which a trainer may have put the model's names."""


@dataclass(frozen=True)
class Description:
    """A model whose tensors were all found."""

    model: Any
    """Without weights."""
    tensors: dict[str, Source]
    place: Path
    """With config.json, and tokenizer."""
    base: Path | None
    files: dict[Path, dict[str, StoredTensor]]
    """Of the base, of which some tensors are."""

    def plan(self, how: ExportConfig) -> Plan:
        def load() -> Any:
            raise UserError(
                f"{self.place}: its interpolation weighs each token by itself: give --alpha a number, or write it "
                "expanded and use controlllm fold, which measures"
            )

        fill_interpolations(self.model, self.tensors)
        alphas = alphas_for(how, load, load_tokenizer(self.place))
        return arrange(self.model, self.tensors, self.files, how, alphas=alphas)


def describe(source: Path, found: Mapping[str, Source], base: Path | None) -> Description:
    """UserError where no config.json says what it is, or a tensor is missing, unexpected or misshapen."""
    place = next((p for p in (source, source.parent, base) if p and (p / "config.json").is_file()), None)
    if place is None:
        raise UserError(f"{source}: no config.json in or beside it says which model it is; give its base with --base")
    found = {_unwrapped(name): tensor for name, tensor in found.items()}
    values = read_json(place / "config.json")
    model = _prior_model(place, values, found) if "expansion" in values else _model(place)
    prior = model.config.control if "expansion" in values else None
    wanted = untied(model)
    names = {name: prior_name(name, prior) if prior else name for name in wanted}
    found = _without_prefix(source, found, set(names.values()) | set(model.state_dict()))
    files = _base_files(base) if base else {}
    of_base = {key: tensor for file in files.values() for key, tensor in file.items()}
    pairs = pair_names(model)
    tensors: dict[str, Source] = {}
    for name, theirs in names.items():
        source_of = found.get(theirs) or of_base.get(name) or of_base.get(base_name(name, pairs))
        if source_of is None:
            where = f"nor in {base}" if base else "and no --base is given to take it from"
            raise UserError(f"{source}: tensor '{theirs}' is not in it, {where}")
        if tuple(source_of.shape) != tuple(wanted[name].shape):
            said = f"has shape {list(source_of.shape)}, {place / 'config.json'} makes it {list(wanted[name].shape)}"
            raise UserError(f"{source}: tensor '{theirs}' {said}; one of the two is of another model (--base)")
        tensors[name] = _as_ours(name, source_of) if prior else source_of
    known = {*names.values(), *model.all_tied_weights_keys, *(base_name(name, pairs) for name in names)}
    if odd := sorted(found.keys() - known):
        raise UserError(f"{source}: tensor '{odd[0]}' is not of the model of {place / 'config.json'} (--base)")
    return Description(model, tensors, place, base, files)


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _without_prefix(source: Path, found: Mapping[str, Source], wanted: set[str]) -> dict[str, Source]:
    """By the prefix under which most of the model's names are."""

    def under(prefix: str) -> int:
        return sum(prefix + name in found for name in wanted)

    best = max(PREFIXES, key=under)
    if not under(best):
        some = next(iter(found), "none at all")
        raise UserError(f"{source}: none of its tensors ({some}, ...) is of the model that config.json describes")
    return {name.removeprefix(best): tensor for name, tensor in found.items() if name.startswith(best)}


def _model(place: Path) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
    model.tie_weights()
    return model


def _prior_model(place: Path, values: dict[str, Any], found: Mapping[str, Source]) -> Any:
    from accelerate import init_empty_weights

    from controlllm.control.model import family

    file = place / "config.json"
    settings = PriorConfig(file, values).settings()
    kind = base_family(values, found, asked=None, file=file)
    with init_empty_weights(include_buffers=False):
        model: Any = family(kind).causal_lm(our_config(values, kind, settings, file=file))  # type: ignore[call-arg]
    model.tie_weights()
    return model


def _base_files(base: Path) -> dict[Path, dict[str, StoredTensor]]:
    """A folder that has a config.json and no weights gives none."""
    if not list(base.glob("*.safetensors")):
        return {}
    from controlllm.train.weight_files import weight_files

    return {file: read_header(file) for file in weight_files(base)}


def _as_ours(name: str, source: Source) -> Source:
    return Changed(source, minus_identity) if name.endswith(".interpolation.map_delta") else source
