"""Answers by transformers in this process: a token at a time, with the keys and values of all turns before."""

import inspect
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from controlllm.chat.decoding import shared_start
from controlllm.chat.engine import Request
from controlllm.chat.settings import Sampling
from controlllm.control.expand import set_alpha_scale, settings_of
from controlllm.fingerprint import version
from controlllm.train.prompt import virtual_tokens_of
from controlllm.tuned import as_base

PIECE = 512
"""Tokens of a prompt that are computed at a time: Ctrl-C is heard between pieces."""
KEPT_WHOLE = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers whose cache can be cut anywhere if it is kept whole; other kinds keep a state without places."""


class LocalEngine:
    """A model in this process's memory."""

    one_at_a_time = False

    def __init__(self, model: Any):
        self.model = model.requires_grad_(False).eval()
        self.model.config.use_cache = True
        settings, virtual = settings_of(model), virtual_tokens_of(model)
        self.alpha = settings.alpha_scale if settings else None
        self.holds_base = settings is not None or virtual is not None
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context = positions and positions - (virtual.count if virtual else 0)
        self.about = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}, transformers"
        self.about += f" {version('transformers')}"
        self._memories = {base: Memory(model) for base in (False, True)}

    def answer(self, request: Request) -> "LocalAnswer":
        return LocalAnswer(self._memories[request.base], request)

    def set_alpha(self, alpha: float) -> None:
        set_alpha_scale(self.model, alpha)
        self.alpha = alpha
        self._memories[False].forget()

    def close(self) -> None:
        """Nothing outlives the process."""


class Memory:
    """Keys and values of the tokens that a model has seen last."""

    def __init__(self, model: Any):
        self.model = model
        self.ids: list[int] = []
        self._cache: DynamicCache | None = None
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or KEPT_WHOLE)
        self._can_be_cut = kinds <= KEPT_WHOLE
        parameters = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def forget(self) -> None:
        self.ids, self._cache = [], None

    def go_back_to(self, ids: list[int]) -> int:
        """Keep what `ids` begins with, all but its last token; returns how many tokens that are."""
        kept = shared_start(self.ids, ids[:-1])
        if self._cache is None or kept == 0 or (kept < len(self.ids) and not self._can_be_cut):
            self.forget()
            return 0
        if kept < len(self.ids):
            self._cache.crop(kept - len(self.ids))  # negative: as many as are taken away
            self.ids = self.ids[:kept]
        return kept

    @torch.inference_mode()
    def read(self, ids: list[int], *, base: bool) -> Tensor:
        """Take more tokens in; returns the logits behind the last of them, (vocabulary,)."""
        cache = self._cache if self._cache is not None else self._fresh()
        seen, self.ids, self._cache = self.ids, [], None  # an interruption leaves a cache that is half filled
        with as_base(self.model) if base else nullcontext():
            tokens = torch.tensor([ids], device=self.model.device)  # (1, tokens)
            out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **self._last_only)
        self.ids, self._cache = seen + ids, cache
        return out.logits[0, -1].float()

    def _fresh(self) -> DynamicCache:
        """Without a config every layer keeps all tokens, of which a window sees some: only that can be cut."""
        return DynamicCache() if self._can_be_cut else DynamicCache(config=self.model.config)


class LocalAnswer:
    """One answer being written."""

    def __init__(self, memory: Memory, request: Request):
        self._memory, self._request = memory, request
        self.reused = 0
        self._tokens = self._written()

    def __iter__(self) -> Iterator[int | None]:
        return self._tokens

    def close(self) -> None:
        self._tokens.close()

    def _written(self) -> Generator[int | None, None, None]:
        request, memory = self._request, self._memory
        choose = Choice(request.sampling, request.seed, memory.model.device)
        self.reused = memory.go_back_to(request.ids)
        new = request.ids[self.reused :]
        while len(new) > PIECE:
            memory.read(new[:PIECE], base=request.base)
            new = new[PIECE:]
            yield None
        for _ in range(request.room):
            token = choose(memory.read(new, base=request.base))
            if token in request.stop:
                return
            yield token
            new = [token]


class Choice:
    """The next token: the likeliest, or drawn."""

    def __init__(self, sampling: Sampling, seed: int, device: torch.device):
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self._warpers: list[Any] = []
        self._drawn = sampling.temperature > 0
        if self._drawn:
            self._warpers = [TemperatureLogitsWarper(sampling.temperature)]
            self._warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
            self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """logits: (vocabulary,)."""
        if not self._drawn:
            return int(logits.argmax())
        scores = logits[None]
        for warp in self._warpers:
            scores = warp(None, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
