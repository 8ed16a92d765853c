"""Control LLM: teach a language model something new without losing what it knows (arXiv 2501.10979)."""

from typing import Any

import wrapt

__version__ = "0.1.0"


def load(checkpoint: Any, *, alpha_scale: float = 1.0, dtype: str | None = None) -> Any:
    """An expanded checkpoint with the dial at `alpha_scale`: 0 is the base model bit by bit, 1 the trained one.

    Or a checkpoint with virtual tokens, which are no part of a model that transformers loads by itself.
    """
    from controlllm.dial import load as load_at
    from controlllm.tuned import has_virtual_tokens, load_tuned

    if alpha_scale == 1 and has_virtual_tokens(checkpoint):
        return load_tuned(checkpoint, dtype=dtype)
    return load_at(checkpoint, alpha_scale=alpha_scale, dtype=dtype)


# transformers takes seconds to import and `controlllm --help` must not wait for it: our checkpoints are made known
# when (or if) its registry is loaded, whichever of the two packages comes first.
@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register_with_transformers(auto: Any) -> None:
    from controlllm.control.checkpoint_config import MODEL_TYPE, AnyControlConfig

    auto.AutoConfig.register(MODEL_TYPE, AnyControlConfig, exist_ok=True)
