"""lm-evaluation-harness's model: texts become tokens here, and any engine answers them.

Tokens, truncation, chat template and where an answer ends are the same whatever runs the model; so are the scores.
They are those of lm-eval's own Hugging Face model, but for the penalties and sampling of a checkpoint's
generation_config, which are no part of a task.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from controlllm.benchmark.engine import Answer, Engine, Pair, Prompt
from controlllm.errors import UserError
from controlllm.progress import Advance

Request = tuple[Any, list[int], list[int]]  # (what the harness calls it, context, continuation)
DEFAULT_NEW_TOKENS = 256  # lm-eval's, for tasks that do not say


class TokenLM(TemplateLM):
    """What `lm_eval.evaluator.evaluate` asks. `advance` is told how many sequences are `done`."""

    def __init__(self, engine: Engine, tokenizer: Any, config: Any, advance: Advance):
        super().__init__()
        self.engine, self.tokenizer, self.advance, self.done = engine, tokenizer, advance, 0
        virtual = getattr(config, "prompt", None) or {}
        self.max_length = resolve_max_length(config, tokenizer) - virtual.get("num_virtual_tokens", 0)
        self._encode = lru_cache(64)(self._tokens)  # the answers to one question stand side by side

    def count(self, text: str) -> int:
        """Tokens of a text whose every token is scored."""
        return len(self.tok_encode(text))

    def count_after(self, prompt: str, target: str) -> int:
        """Tokens that are scored of a target after its prompt, as the harness splits the two."""
        return len(self._encode_pair(prompt, target)[1])

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; of one without an answer yet, `add_generation_prompt` opens it."""
        from jinja2 import TemplateError

        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how)
        except TemplateError:  # some templates refuse the system's role: lm-eval asks without it
            others = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(others, tokenize=False, **how)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return list(self._encode(string, add_special_tokens))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Answer]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Every token of a text once, in windows of the model's length."""
        owners, windows = [], []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(make_disjoint_window, rolling):
                owners.append(place)
                windows.append((None, *window))
        sums = [0.0] * len(requests)
        first = [before != place for before, place in pairwise([None, *owners])]
        for place, (chance, _) in zip(owners, self._loglikelihood_tokens(windows, counted=first), strict=True):
            sums[place] += chance
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts, cut before what ends them."""
        seen: dict[str, int] = {}
        prompts = []
        for text, settings in (request.args for request in requests):
            prompts.append(self._prompt(text, settings, seed=seen.setdefault(text, 0)))
            seen[text] += 1
        answers = self._answers(prompts)
        return [self._text(answer, prompt.until) for answer, prompt in zip(answers, prompts, strict=True)]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], counted: Sequence[bool] | None = None, **kwargs: Any
    ) -> list[Answer]:
        pairs = []
        for _, context, continuation in requests:
            assert context
            assert 0 < len(continuation) <= self.max_length
            kept = self.max_length + 1 - len(continuation)  # the last token is never an input
            pairs.append(Pair(context[-kept:], continuation))
        return self._answers(pairs, counted)

    def _prompt(self, text: str, settings: dict[str, Any], *, seed: int) -> Prompt:
        found: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
        end = self.tokenizer.decode(self.eot_token_id)
        until = [words for words in handle_stop_sequences(found.pop("until"), eos=end) if words]
        size = found.pop("max_gen_toks")
        if size >= self.max_length:
            raise UserError(
                f"the task generates up to {size} tokens, but the model's length is {self.max_length}; "
                "leave the task out"
            )
        tokens, size = maybe_truncate(self.tok_encode(text), size, self.max_length, verbose=False)
        names = ("temperature", "top_p", "top_k") if found.pop("do_sample") else ()
        sampled: dict[str, Any] = {name: found[name] for name in names if name in found}
        return Prompt(tokens, size, until, seed=seed, **sampled)

    def _text(self, tokens: list[int], until: list[str]) -> str:
        return postprocess_generated_text(self.tokenizer.decode(tokens, skip_special_tokens=True), until, None)

    def _answers(self, requests: Sequence[Any], counted: Sequence[bool] | None = None) -> list[Any]:
        """In the order of the requests. counted: which of them are sequences, and not parts of one."""
        if not requests:
            return []
        plan = self.engine.plan(requests)
        found: dict[int, Any] = {}
        for number, answers in self.engine.run([[requests[place] for place in batch] for batch in plan]):
            found |= zip(plan[number], answers, strict=True)
            self.done += sum(counted is None or counted[place] for place in plan[number])
            self.advance(self.done, self.engine.name)
        return [found[place] for place in range(len(requests))]

    def _tokens(self, text: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        """With BOS as the tokenizer's settings say, but not a second time where a chat template wrote it."""
        if add_special_tokens is None and has_bos_prefix(text, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return tuple(self.tokenizer.encode(text, **special))
