"""What a run does, as one frozen tree: `load_config("demo.yaml", "train.lr=1e-4")` builds it.

Nothing here imports torch, so that a mistake is reported within a second.
"""

from controlllm.config.assess import (
    BenchmarkConfig,
    BestConfig,
    GenerateConfig,
    ProbeConfig,
    ReportConfig,
    RetentionConfig,
    SmokeConfig,
    ValidationConfig,
)
from controlllm.config.base import Config
from controlllm.config.data import DatasetConfig, MixConfig, PackConfig
from controlllm.config.export import ExportConfig
from controlllm.config.method import (
    INTERPOLATIONS,
    SCALAR_ALPHA,
    ControlConfig,
    IA3Config,
    LoRAConfig,
    Method,
    ModelConfig,
    PartialConfig,
    PromptConfig,
    QuantizationConfig,
    RampConfig,
)
from controlllm.config.run import RunConfig, load_config, validate
from controlllm.config.train import (
    DDP,
    FSDP,
    CheckpointConfig,
    DeepSpeed,
    GuardsConfig,
    MetricsConfig,
    OptimizerConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "DDP",
    "FSDP",
    "INTERPOLATIONS",
    "SCALAR_ALPHA",
    "BenchmarkConfig",
    "BestConfig",
    "CheckpointConfig",
    "Config",
    "ControlConfig",
    "DatasetConfig",
    "DeepSpeed",
    "ExportConfig",
    "GenerateConfig",
    "GuardsConfig",
    "IA3Config",
    "LoRAConfig",
    "Method",
    "MetricsConfig",
    "MixConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PackConfig",
    "PartialConfig",
    "ProbeConfig",
    "ProfileConfig",
    "PromptConfig",
    "QuantizationConfig",
    "RampConfig",
    "ReportConfig",
    "RetentionConfig",
    "RunConfig",
    "ScheduleConfig",
    "SmokeConfig",
    "TrainConfig",
    "ValidationConfig",
    "load_config",
    "validate",
]
