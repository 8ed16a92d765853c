"""How transformers recognises a checkpoint of ours. Light: it is registered whenever transformers is imported."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

MODEL_TYPE = "controlllm"


class AnyControlConfig(PreTrainedConfig):
    """What AutoConfig knows as `controlllm`: reading one gives a config of the base's own class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from controlllm.control.model import family

        if "base_model_type" not in config_dict:
            raise ValueError("config.json of a controlllm checkpoint must name its base_model_type")
        return family(config_dict["base_model_type"]).config.from_dict(config_dict, **kwargs)
