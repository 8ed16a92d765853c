"""Stage 3: training, in as many processes as the cluster profile says."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from controlllm.config import (
    ControlConfig,
    IA3Config,
    LoRAConfig,
    Method,
    MixConfig,
    ModelConfig,
    PartialConfig,
    PromptConfig,
    QuantizationConfig,
    TrainConfig,
    ValidationConfig,
)
from tasks import cluster
from tasks.artifacts import DECK, Folder, local, one_line_errors, publish, stage_cache
from tasks.live import live_deck


@task(
    task_config=cluster.processes(),
    cache=stage_cache("train"),
    **cluster.runs("train"),
    **DECK,
)
@one_line_errors
def train(
    base: FlyteDirectory,
    shards: FlyteDirectory,
    model: ModelConfig,
    control: ControlConfig | None,
    lora: LoRAConfig | None,
    ia3: IA3Config | None,
    prompt: PromptConfig | None,
    partial: PartialConfig | None,
    quantization: QuantizationConfig | None,
    mix: MixConfig,
    config: TrainConfig,
    validation: ValidationConfig | None,
) -> Folder:
    """The trained tensors and the metrics of every step. Runs in every process of the job."""
    from controlllm.train.stage import train as train_stage

    with live_deck():
        folder = train_stage(
            local(base),
            local(shards),
            model=model,
            method=Method(
                control=control,
                lora=lora,
                ia3=ia3,
                prompt=prompt,
                partial=partial,
                quantization=quantization,
            ),
            mix=mix,
            config=config,
            validation=validation,
        )
    return publish(folder)
