"""Control LLM: teach a language model something new without losing what it knows (arXiv 2501.10979)."""

import wrapt

__version__ = "0.1.0"


# transformers takes seconds to import and `controlllm --help` must not wait for it: the model classes are
# made known when (or if) transformers' registry is loaded, whichever of the two packages comes first.
@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register_with_transformers(_module: object) -> None:
    from controlllm.control.model import register

    register()
