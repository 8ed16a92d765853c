"""What a checkpoint must know to be built again: stored in the model's `config.json` under `control`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from controlllm.config import ControlConfig


@dataclass(frozen=True)
class ControlSettings:
    """A resolved `ControlConfig`: the sites are layer indices of the base model."""

    sites: list[int]
    layout: str = "concat"
    interpolation: str = "lerp"
    alpha: float = 0.5
    train_alpha: bool = True
    norm_relaxation: float | str = 0.0
    divergence: str = "mse"
    divergence_weight: float = 1.0
    divergence_alpha: str = "fixed"
    teacher: str = "block"
    detach_teacher: bool = True
    alpha_scale: float = 1.0
    """The dial: 0 gives the base model, 1 the trained one."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha_scale <= 1:
            raise ValueError(f"alpha_scale must be between 0 (the base model) and 1, found {self.alpha_scale}")

    @classmethod
    def resolve(cls, config: ControlConfig, *, num_layers: int) -> "ControlSettings":
        """The settings for a model of `num_layers` layers; ValueError when the sites do not fit it."""
        own = {field.name for field in fields(cls)} - {"sites", "alpha_scale"}
        return cls(sites=choose_sites(config, num_layers), **config.model_dump(include=own))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ControlSettings":
        return cls(**values)

    @property
    def stacked_sites(self) -> list[int]:
        """Base layers that a copy follows."""
        return {"concat": [], "stack": self.sites, "hybrid": self.sites[0::2]}[self.layout]

    @property
    def paired_sites(self) -> list[int]:
        """Base layers that run beside a twin."""
        return {"concat": self.sites, "stack": [], "hybrid": self.sites[1::2]}[self.layout]

    @property
    def stacked(self) -> list[int]:
        """Layer indices of the copies in the expanded model."""
        return [site + before + 1 for before, site in enumerate(self.stacked_sites)]

    @property
    def paired(self) -> list[int]:
        """Layer indices of the pairs in the expanded model."""
        return [site + sum(other < site for other in self.stacked_sites) for site in self.paired_sites]


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
    if config.sites == "every_nth_of_top":
        return _every_nth_of_top(count, config.every_nth, num_layers)
    if num_layers % count:
        fits = ", ".join(str(e) for e in range(1, num_layers + 1) if num_layers % e == 0)
        raise ValueError(
            f"control.num_expanded: {count} does not divide the model's {num_layers} layers; use one of {fits}"
        )
    step = num_layers // count
    return list(range(step - 1, num_layers, step))


def _every_nth_of_top(count: int, nth: int, num_layers: int) -> list[int]:
    """The last layer, the one `nth` below it, and so on: `count` in all."""
    lowest = num_layers - 1 - (count - 1) * nth
    if lowest < 0:
        raise ValueError(
            f"control.every_nth: {count} sites at every {nth}th layer need {(count - 1) * nth + 1} layers, the model "
            f"has {num_layers}; use at most {(num_layers - 1) // (count - 1)}"
        )
    return list(range(lowest, num_layers, nth))
