"""One model over all prompts; hidden states go to the disk, so that memory holds those of one prompt or one layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from controlllm.config import ProbeConfig
from controlllm.errors import UserError
from controlllm.probe.lens import followed, lens
from controlllm.probe.measure import Site, see
from controlllm.probe.prompts import Prompt
from controlllm.progress import Advance

Json = dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """What is left of a prompt in one model."""

    file: Path
    """With `states` (layers + 1, tokens, hidden) and `final` log probabilities (lens tokens, vocabulary)."""
    importance: list[float]
    target: int
    """The token whose logit the importance is of."""
    lens: list[list[Json]]
    """Per lens token and layer."""
    sites: dict[int, Site]
    """By layer; maps only of prompts that are drawn."""
    attention: dict[int, list[float] | None]
    """By layer and head: the share of attention that the twin puts elsewhere, mean over tokens."""

    def states(self, layer: int) -> Tensor:
        """(tokens, hidden) in float32."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_slice("states")[layer].float()

    def final(self) -> Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor("final")


def over_prompts(
    model: Any,
    prompts: list[Prompt],
    targets: list[int | None] | list[int],
    config: ProbeConfig,
    folder: Path,
    advance: Advance,
    *,
    done: int = 0,
) -> list[Taken]:
    """targets: the tokens that importance is of, None for what is predicted. done: prompts before these."""
    folder.mkdir()
    taken = []
    for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        file = folder / f"{index}.safetensors"
        taken.append(_over(model, prompt, target, config, file, drawn=index < config.drawn))
        advance(done + index + 1)
    return taken


def _over(model: Any, prompt: Prompt, target: int | None, config: ProbeConfig, file: Path, *, drawn: bool) -> Taken:
    seen = see(model, prompt.ids, target=target)
    states = torch.stack(seen.states)
    if not states.isfinite().all():
        raise UserError(
            f"{prompt.where}: hidden states of {model.config.name_or_path} are not finite in {states.dtype}: the model "
            "diverged, or it needs a wider --dtype"
        )
    ends = states[:, -config.lens_tokens :]
    (final,) = lens(model, seen.after_blocks, ends[-1:])
    save_file({"states": states, "final": torch.log_softmax(final, dim=-1).cpu()}, file)
    attention = {layer: None if site.maps is None else elsewhere(*site.maps) for layer, site in seen.sites.items()}
    sites = seen.sites if drawn else {n: Site(s.alpha, s.cosine, s.distance, None) for n, s in seen.sites.items()}
    assert seen.importance is not None
    rows = followed(model, seen.after_blocks, ends)
    return Taken(file, seen.importance.tolist(), seen.target, rows, sites, attention)


def elsewhere(frozen: Tensor, twin: Tensor) -> list[float]:
    """Total variation per head of two maps (heads, tokens, keys), 0 for equal ones and 1 for none in common."""
    return (0.5 * (frozen - twin).abs().sum(-1)).mean(-1).tolist()
