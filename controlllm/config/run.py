"""The whole tree, and how it is read."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from controlllm.config.assess import BenchmarkConfig, ProbeConfig, ReportConfig, SmokeConfig, ValidationConfig
from controlllm.config.base import Config, Name
from controlllm.config.data import MixConfig, PackConfig
from controlllm.config.export import ExportConfig
from controlllm.config.launch import PromoteConfig
from controlllm.config.method import (
    ControlConfig,
    IA3Config,
    LoRAConfig,
    Method,
    ModelConfig,
    PartialConfig,
    PromptConfig,
    QuantizationConfig,
)
from controlllm.config.train import TrainConfig
from controlllm.errors import UserError
from controlllm.mistakes import explain
from controlllm.recipe import Source, read


class RunConfig(Config):
    """One run. Optional sections that are left out are off."""

    name: Name
    """Of the run and its folder."""
    output: Annotated[str, Field(min_length=1)] = "runs"
    """Folder in which `<name>/` with the report and a link to the model is put."""
    model: ModelConfig
    control: ControlConfig | None = None
    lora: LoRAConfig | None = None
    ia3: IA3Config | None = None
    prompt: PromptConfig | None = None
    partial: PartialConfig | None = None
    quantization: QuantizationConfig | None = None
    pack: PackConfig = PackConfig()
    mix: MixConfig
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    validation: ValidationConfig | None = None
    benchmark: BenchmarkConfig = BenchmarkConfig()
    smoke: SmokeConfig | None = SmokeConfig()
    probe: ProbeConfig | None = None
    report: ReportConfig = ReportConfig()
    promote: PromoteConfig = PromoteConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_backend_for_both(cls, values: Any) -> Any:
        """vLLM has no place for virtual tokens, and a base is measured as what was made of it."""
        if isinstance(values, dict) and values.get("prompt") and isinstance(values.get("benchmark", {}), dict):
            return values | {"benchmark": {"backend": "hf"} | values.get("benchmark", {})}
        return values

    @model_validator(mode="after")
    def _dial_has_twins(self) -> "RunConfig":
        if self.report.dial and not self.control:
            raise ValueError("report.dial turns twins down, and this run has none: leave it out, or give control")
        if self.report.dial and self.export.form == "folded":
            raise ValueError("report.dial turns twins down, and export.form folded keeps none: leave one of them out")
        return self

    @model_validator(mode="after")
    def _folds(self) -> "RunConfig":
        control = self.control
        if self.export.form != "folded" or control is None or control.layout == "stack":
            return self
        if control.interpolation == "prog" or control.norm_relaxation != 0:
            found = "interpolation prog" if control.interpolation == "prog" else "norm_relaxation"
            raise ValueError(f"export.form folded has no place for control.{found}: use form expanded, or leave it out")
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> "RunConfig":
        if self.pack.streaming and len(self.mix.datasets) > 1 and any(d.weight is None for d in self.mix.datasets):
            raise ValueError(
                "pack.streaming begins before the sizes of the datasets are known: give each of mix.datasets a weight"
            )
        if self.pack.streaming and self.mix.order == "length":
            raise ValueError("mix.order length sorts all rows, which pack.streaming does not wait for: choose one")
        if self.validation and not self.pack.validation_fraction:
            raise ValueError("validation needs held-back documents: set pack.validation_fraction, for example to 0.02")
        if self.control and self.control.divergence == "attention" and self.model.attention != "eager":
            raise ValueError(
                "control.divergence attention needs the attention maps: set model.attention to eager, "
                f"found {self.model.attention}"
            )
        if not self.method.trains_all and self.train.precision == "float32" and self.model.dtype != "float32":
            raise ValueError(
                "train.precision float32 computes with the frozen weights as they are stored: set model.dtype to "
                f"float32, too, or train.precision to bf16, found model.dtype {self.model.dtype}"
            )
        small = self.ia3 or (self.lora and self.lora.dora)
        if small and self.train.precision in ("bf16_stochastic", "bf16_kahan"):
            raise ValueError(
                f"train.precision {self.train.precision} keeps what is trained in bf16, which is too coarse for the "
                f"factors near 1 of {'ia3' if self.ia3 else 'lora.dora'}: use train.precision bf16"
            )
        if self.quantization and (self.method.trains_all or self.partial):
            raise ValueError("quantization stores frozen weights: it needs a control, lora, ia3 or prompt section")
        return self

    @model_validator(mode="after")
    def _one_method(self) -> "RunConfig":
        methods = [name for name in ("control", "lora", "ia3", "prompt", "partial") if getattr(self, name)]
        twin = self.control.twin if self.control else "full"
        if twin != "full":
            if twin not in methods:
                raise ValueError(f"control.twin {twin} needs a {twin} section, which says how the twin is trained")
            methods.remove(twin)
        if len(methods) > 1:
            hint = " (or set control.twin to it)" if methods[0] == "control" and methods[1] in ("lora", "ia3") else ""
            raise ValueError(f"{methods[0]} and {methods[1]} exclude each other: leave one section out{hint}")
        return self

    @model_validator(mode="after")
    def _fits_flat_shards(self) -> "RunConfig":
        """Of torch's older FSDP: a unit is one tensor, of one dtype, whose gradient is kept whole."""
        parallel = self.train.parallel
        if parallel.kind != "fsdp" or parallel.version == 2:
            return self
        twin = self.control.twin if self.control else "full"
        if twin != "full":
            raise ValueError(
                f"control.twin {twin} and train.parallel.version 1 do not go together: the twin shares weights with "
                "its block, and each of them would be sharded by itself; use version 2"
            )
        dora = self.lora is not None and self.lora.dora
        section = "lora.dora" if dora else "ia3" if self.ia3 else "prompt" if self.prompt else None
        if section and self.model.dtype != "float32" and parallel.frozen == "shard":
            raise ValueError(
                f"{section} is trained in float32, and train.parallel.version 1 shards it in one tensor with frozen "
                f"weights, found model.dtype {self.model.dtype}; use version 2 or parallel.frozen: replicate"
            )
        return self

    @model_validator(mode="after")
    def _probes_measured(self) -> "RunConfig":
        retention = self.validation.retention if self.validation else None
        if missing := [name for name in (retention.probes if retention else []) if name not in self.benchmark.old]:
            raise ValueError(
                f"validation.retention.probes names {missing[0]}, which is not in benchmark.old "
                f"({', '.join(self.benchmark.old)})"
            )
        return self

    @property
    def method(self) -> Method:
        """The sections that say what is trained."""
        return Method(
            control=self.control,
            lora=self.lora,
            ia3=self.ia3,
            prompt=self.prompt,
            partial=self.partial,
            quantization=self.quantization,
        )


def load_config(recipe: str | Path, *overrides: str) -> RunConfig:
    """Read a YAML recipe, apply `section.key=value` overrides left to right, validate once.

    Raises UserError with one line that names file, line, key, what was found and what was expected.
    """
    return validate(*read(Path(recipe), *overrides))


def validate(tree: Any, source: Source) -> RunConfig:
    """The whole tree at once; the first mistake as one line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, RunConfig, tree=tree, source=source)) from None
