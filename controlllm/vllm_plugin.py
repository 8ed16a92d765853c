"""What vLLM runs at its start (entry point `vllm.general_plugins`), so that it loads expanded checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from controlllm.control.settings import ControlSettings

# vLLM imports a model's class by this name when a checkpoint asks for it, and not before.
MODEL_CLASS = "ControlForCausalLM"


def register() -> None:
    """Name one class for the expanded form of every causal LM of transformers. Called in each process of vLLM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    names = {f"Control{base}" for base in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    for name in names - ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"{__name__}:{MODEL_CLASS}")


def __getattr__(name: str) -> Any:
    if name == MODEL_CLASS:
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _model_class() -> type:
    from vllm.model_executor.models.transformers import TransformersForCausalLM

    class ControlForCausalLM(TransformersForCausalLM):
        """vLLM's backend over transformers' modules, with a KV cache for the twins' attentions too."""

        def pipeline_parallel(self) -> None:
            """Stages are cut at an attention's index, and a twin's lies above those of all decoder layers."""
            if self.pp_group.world_size > 1:
                raise ValueError(
                    f"pipeline_parallel_size is {self.pp_group.world_size}, but an expanded model cannot be cut into "
                    "stages; use tensor_parallel_size"
                )

        def _create_attention_instances(self, prefix: str = "") -> None:
            with _attentions_as_layers(self.text_config):
                super()._create_attention_instances(prefix)

    return ControlForCausalLM


@contextmanager
def _attentions_as_layers(config: Any) -> Iterator[None]:
    """While inside, the config counts attentions: the decoder layers', then one per pair, of that layer's kind."""
    sites = ControlSettings.from_dict(config.control).paired
    kinds = getattr(config, "layer_types", None)
    counted: dict[str, Any] = {"num_hidden_layers": config.num_hidden_layers + len(sites)}
    if kinds is not None:
        counted["layer_types"] = [*kinds, *(kinds[site] for site in sites)]
    own = {name: getattr(config, name) for name in counted}
    vars(config).update(counted)
    try:
        yield
    finally:
        vars(config).update(own)
