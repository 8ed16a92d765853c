"""The prior implementation's `config.json`, read as ours: its `expansion`, and the base architecture it hides."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from controlllm.control.checkpoint_config import MODEL_TYPE
from controlllm.control.model import family
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError

METHODS = {
    "lerp": "lerp", "slerp": "slerp_softened", "dlerp": "dlerp", "dlerpin": "dlerpin", "moe": "moe_hard",
    "proj": "proj", "prog": "prog",
}  # fmt: skip
# Ours and its share of the weight. The magnitude term of `dot` was always 0, which leaves half of cosine.
LOSSES = {"mse": ("mse", 1.0), "cosine": ("cosine", 1.0), "dot": ("cosine", 0.5), "attention": ("attention", 1.0)}
NAMES_OF_BASE = ("expanded_from", "trained_from", "_name_or_path")
NOT_TAKEN_OVER = {
    *NAMES_OF_BASE, "expansion", "architectures", "auto_map", "model_type", "transformers_version", "use_cache",
    "_commit_hash", "_attn_implementation", "_attn_implementation_autoset",
}  # fmt: skip


def read_json(file: Path) -> dict[str, Any]:
    """UserError where there is no JSON object."""
    if not file.exists():
        raise UserError(f"{file}: not found; name the folder of a checkpoint")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: no JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: no JSON object")
    return values


def our_config(
    values: Mapping[str, Any], base_model_type: str, settings: ControlSettings, *, file: Path
) -> PreTrainedConfig:
    """The stacked layers are counted in `values` already."""
    classes = family(base_model_type)
    kept = {key: value for key, value in values.items() if key not in NOT_TAKEN_OVER}
    ours = {
        "architectures": [classes.causal_lm.__name__],
        "base_model_type": base_model_type,
        "model_type": MODEL_TYPE,
        "control": settings.to_dict(),
    }
    try:
        return classes.config.from_dict(kept | ours)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: is not of a {base_model_type}: {' '.join(str(error).split())}") from None


def base_names(values: Mapping[str, Any]) -> dict[str, str]:
    """What the checkpoint calls its base, without the folders of the machine it was made on."""
    places = {**values, **values.get("expansion", {})}
    found = {key: places[key] for key in NAMES_OF_BASE if isinstance(places.get(key), str)}
    return {key: PurePosixPath(name.replace("\\", "/")).name for key, name in found.items()}


def base_family(values: Mapping[str, Any], tensors: Iterable[str], *, asked: str | None, file: Path) -> str:
    """The base's model type: what is asked for, or the config's own, or what its keys and tensors or names tell."""
    if asked is not None and not _is_causal_lm(asked):
        raise UserError(f"--base-family: {asked} is no causal LM of transformers; llama, qwen2 and mistral are")
    own = values.get("model_type")
    found = asked or (own if _is_causal_lm(own) else None) or _by_structure(values, set(tensors))
    if found := found or _by_name(base_names(values).values()):
        return found
    raise UserError(f"{file}: model_type {own} does not tell the base architecture; name it with --base-family llama")


def _is_causal_lm(model_type: Any) -> bool:
    return model_type in CONFIG_MAPPING and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _by_structure(values: Mapping[str, Any], tensors: set[str]) -> str | None:
    """Before the names, because a person chose those. Norms of queries are of families that only a name tells."""
    if any(name.endswith("q_norm.weight") for name in tensors):
        return None
    biased = any(name.endswith("q_proj.bias") for name in tensors)
    if (biased and not any(name.endswith("o_proj.bias") for name in tensors)) or (
        {"use_sliding_window", "max_window_layers"} & values.keys()
    ):
        return "qwen2"
    if {"mlp_bias", "pretraining_tp"} & values.keys():
        return "llama"
    return "mistral" if "sliding_window" in values else None


def _by_name(names: Iterable[str]) -> str | None:
    """The longest model type in the first name that has one: `Qwen2.5-7B` is qwen2."""
    for name in names:
        plain = re.sub("[^a-z0-9]", "", name.lower())
        fits = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if len(kind) > 3 and kind.replace("_", "") in plain]
        if fits:
            return max(fits, key=len)
    return None


@dataclass(frozen=True)
class PriorConfig:
    """What `file` (a `config.json`) holds."""

    file: Path
    values: dict[str, Any]

    def settings(self) -> ControlSettings:
        """UserError names the setting that does not fit."""
        if not isinstance(self.expansion, dict):
            raise UserError(
                f"{self.file}: has no `expansion`: not a checkpoint of the prior Control LLM implementation"
            )
        layout = self._one_of("expand_type", ("concat", "stack", "hybrid"))
        divergence, weight, alpha = self._divergence()
        start = self._number("interpolation_factor", at_least=-math.inf)
        settings = ControlSettings(
            sites=[],
            layout=layout,
            interpolation=self._interpolation(layout, start),
            alpha=min(max(_sigmoid(start or 0.0), 1e-6), 1 - 1e-6),
            train_alpha=not self.expansion.get("freeze_interpolation_factor", False),
            norm_relaxation=self._norm_relaxation(),
            divergence=divergence,
            divergence_weight=weight,
            divergence_alpha=alpha,
            detach_teacher=False,
        )
        return self._with_sites(settings)

    @property
    def expansion(self) -> Any:
        return self.values.get("expansion")

    @property
    def also_trained(self) -> list[str]:
        """What was trained there beside what Control LLM trains."""
        kinds = {"freeze_ori_layers": "frozen blocks", "freeze_ori_non_layers": "embeddings, norm and head"}
        return [what for key, what in kinds.items() if self.expansion.get(key, True) is False]

    def _interpolation(self, layout: str, start: float | None) -> str:
        if layout == "stack":
            return "lerp"  # there is nothing to blend
        method = self._one_of("merge_method", tuple(METHODS))
        if start is None and method != "lerp":
            raise self._wrong("interpolation_factor", None, f"a number, for merge_method {method}")
        return "none" if start is None else METHODS[method]

    def _divergence(self) -> tuple[str, float, str]:
        """Kind, weight, and what weighs a token."""
        kind, share = LOSSES[self._one_of("interpolation_loss_type", tuple(LOSSES), default="cosine")]
        weight = self._number("interpolation_loss_alpha", at_least=0, special=-1) or 0.0
        if weight == 0:
            return "none", 1.0, "fixed"
        return (kind, share, "gate") if weight == -1 else (kind, share * weight, "fixed")

    def _norm_relaxation(self) -> float | str:
        relaxation = self._number("interpolation_norm_alpha", at_least=0, special=-1) or 0.0
        if relaxation > 1:
            raise self._wrong("interpolation_norm_alpha", relaxation, "-1 or a share from 0 to 1")
        return "learned" if relaxation == -1 else relaxation

    def _with_sites(self, settings: ControlSettings) -> ControlSettings:
        """From the layers of the expanded model that are not frozen to the base's layers."""
        layers = self.values.get("num_hidden_layers")
        if type(layers) is not int or layers < 1:
            raise UserError(f"{self.file}: num_hidden_layers is {layers}; it must be the number of layers")
        frozen = self.expansion.get("freezed_layers")
        if not isinstance(frozen, list) or not all(type(i) is int and 0 <= i < layers for i in frozen):
            raise self._wrong("freezed_layers", frozen, f"a list of layers from 0 to {layers - 1}")
        trained = [index for index in range(layers) if index not in frozen]
        stacked = {"concat": [], "stack": trained, "hybrid": trained[0::2]}[settings.layout]
        sites = [index - sum(other <= index for other in stacked) for index in trained]
        ours = ControlSettings(**{**settings.to_dict(), "sites": sites})
        if not sites or sites[0] < 0 or sites != sorted(set(sites)) or sorted(ours.stacked + ours.paired) != trained:
            raise self._wrong("freezed_layers", frozen, f"the layers between those of layout {settings.layout}")
        for key, count in {"num_ori_layers": layers - len(stacked), "num_exp_layers": len(sites)}.items():
            if self.expansion.get(key, count) != count:
                raise self._wrong(
                    key, self.expansion[key], f"{count}, by num_hidden_layers {layers} and freezed_layers"
                )
        return ours

    def _one_of(self, key: str, choices: tuple[str, ...], *, default: str | None = None) -> str:
        value = self.expansion.get(key, default)
        if value not in choices:
            raise self._wrong(key, value, f"one of {', '.join(choices)}")
        return value

    def _number(self, key: str, *, at_least: float, special: float | None = None) -> float | None:
        value = self.expansion.get(key, 0.0)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value) or (value < at_least and value != special):
            raise self._wrong(
                key, value, "a number" if special is None else f"{special} or a number from {at_least} on"
            )
        return float(value)

    def _wrong(self, key: str, found: Any, wanted: str) -> UserError:
        return UserError(f"{self.file}: expansion.{key} is {found}; it must be {wanted}")


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
