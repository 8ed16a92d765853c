"""Stage 4: one Hugging Face directory."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import (
    ControlConfig,
    IA3Config,
    LoRAConfig,
    Method,
    PartialConfig,
    PromptConfig,
    QuantizationConfig,
)
from controlllm.config.export import ExportConfig
from tasks import cluster
from tasks.artifacts import DECK, Folder, local, one_line_errors, publish, stage_cache


@task(
    cache=stage_cache("consolidate"),
    **cluster.runs("consolidate"),
    **DECK,
)
@one_line_errors
def consolidate(
    base: FlyteDirectory,
    trained: FlyteDirectory,
    control: ControlConfig | None,
    lora: LoRAConfig | None,
    ia3: IA3Config | None,
    prompt: PromptConfig | None,
    partial: PartialConfig | None,
    quantization: QuantizationConfig | None,
    export: ExportConfig,
) -> Folder:
    """Base and trained tensors as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads."""
    from controlllm.consolidate import consolidate as consolidate_stage

    method = Method(
        control=control,
        lora=lora,
        ia3=ia3,
        prompt=prompt,
        partial=partial,
        quantization=quantization,
    )
    return publish(consolidate_stage(local(base), local(trained), method, export).path)
