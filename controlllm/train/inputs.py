"""What the training stage reads."""

from dataclasses import dataclass
from pathlib import Path

from controlllm.config import Method, MixConfig, ModelConfig, TrainConfig, ValidationConfig


@dataclass(frozen=True)
class Inputs:
    """Folders of the stages before, and the sections of the recipe that are this stage's."""

    base: Path
    shards: Path
    model: ModelConfig
    method: Method
    mix: MixConfig
    config: TrainConfig
    validation: ValidationConfig | None
