"""lm-evaluation-harness's Hugging Face model, reporting progress as the rest of a run does."""

from typing import Any

from lm_eval.models import huggingface

from controlllm.progress import Advance

HFLM: Any = huggingface.HFLM  # its registering decorator hides its type


class CountingLM(HFLM):
    """Counts the sequences that are done."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, advance: Advance):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.advance, self.done = advance, 0

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        out = super()._model_call(inps, *args, **kwargs)
        self._count(inps)
        return out

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        out = super()._model_generate(context, *args, **kwargs)
        self._count(context)
        return out

    def _count(self, inputs: Any) -> None:
        self.done += len(inputs)
        self.advance(self.done)

    def count(self, text: str) -> int:
        """Tokens of a text whose every token is scored."""
        return len(self.tok_encode(text))

    def count_after(self, prompt: str, target: str) -> int:
        """Tokens that are scored of a target after its prompt, as the harness splits the two."""
        return len(self._encode_pair(prompt, target)[1])

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().generate_until(requests, disable_tqdm=True)
