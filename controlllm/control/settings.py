"""What a checkpoint must know to be built again: stored in the model's `config.json` under `control`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from controlllm.config import ControlConfig


@dataclass(frozen=True)
class ControlSettings:
    """A resolved `ControlConfig`: the sites are layer indices."""

    sites: list[int]
    layout: str = "concat"
    interpolation: str = "lerp"
    alpha: float = 0.5
    train_alpha: bool = True
    divergence: str = "mse"
    divergence_weight: float = 1.0
    detach_teacher: bool = True

    @classmethod
    def resolve(cls, config: ControlConfig, *, num_layers: int) -> "ControlSettings":
        """The settings for a model of `num_layers` layers; ValueError when the sites do not fit it."""
        fields = config.model_dump(exclude={"sites", "num_expanded"})
        return cls(sites=choose_sites(config, num_layers), **fields)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ControlSettings":
        return cls(**values)


def choose_sites(config: ControlConfig, num_layers: int) -> list[int]:
    """Layer indices of the sites (method.md, "Sites"); ValueError names what fits."""
    count = config.num_expanded
    if count > num_layers:
        raise ValueError(f"control.num_expanded: {count} sites do not fit into the model's {num_layers} layers")
    if isinstance(config.sites, list):
        if config.sites[-1] >= num_layers:
            raise ValueError(
                f"control.sites: layer {config.sites[-1]} is out of range; the model has layers 0..{num_layers - 1}"
            )
        return config.sites
    if config.sites == "top":
        return list(range(num_layers - count, num_layers))
    if config.sites != "evenly":
        raise ValueError(
            f"control.sites: {config.sites!r} is not in this version yet; use evenly, top or a list of layers"
        )
    if num_layers % count:
        fits = ", ".join(str(e) for e in range(1, num_layers + 1) if num_layers % e == 0)
        raise ValueError(
            f"control.num_expanded: {count} does not divide the model's {num_layers} layers; use one of {fits}"
        )
    step = num_layers // count
    return list(range(step - 1, num_layers, step))
