"""Both models' passes as numbers: per layer, per site, per prompt, and a row for each token and layer."""

import math
from statistics import fmean
from typing import Any

import torch

from controlllm.config import ProbeConfig
from controlllm.probe.drift import FEWEST, drift, linear_cka
from controlllm.probe.lens import divergence
from controlllm.probe.measure import Layer
from controlllm.probe.passes import Taken
from controlllm.probe.prompts import Prompt, visible

Json = dict[str, Any]


def build_result(
    layers: list[Layer],
    prompts: list[Prompt],
    base: list[Taken],
    tuned: list[Taken],
    config: ProbeConfig,
    tokenizer: Any,
) -> tuple[Json, list[Json]]:
    """What probe.json holds beside its settings, and the rows of probe.parquet."""
    rows = _rows(layers, prompts, base, tuned)
    told = [_layer(layers, n, rows, base, tuned) for n in range(len(layers))]
    moved = [row for row in rows if row["angle"] is not None]
    most = max(moved, key=lambda row: row["angle"])
    known = [layer for layer in told if layer["cka"] is not None]
    least = min(known, key=lambda layer: layer["cka"], default=None)
    result = {
        "tokens": sum(len(prompt.ids) for prompt in prompts),
        "layers": told,
        "sites": _sites(layers, tuned),
        "most_moved": {key: most[key] for key in ("prompt", "position", "token", "layer", "angle", "cosine")},
        "least_cka": least and {"layer": least["layer"], "cka": least["cka"]},
        "prompts": [
            _prompt(*each, layers=layers, tokenizer=tokenizer) for each in zip(prompts, base, tuned, strict=True)
        ],
    }
    return result, rows


def _rows(layers: list[Layer], prompts: list[Prompt], base: list[Taken], tuned: list[Taken]) -> list[Json]:
    rows = []
    for number, (prompt, before, after) in enumerate(zip(prompts, base, tuned, strict=True), start=1):
        for index, layer in enumerate(layers):
            cosine, ratio = (values.tolist() for values in drift(before.states(index), after.states(index)))
            site = after.sites.get(index - 1)
            own = [values.tolist() for values in (site.alpha, site.cosine, site.distance)] if site else None
            for position, token in enumerate(prompt.tokens):
                at: list[float | None] = [_number(values[position]) for values in own] if own else [None] * 3
                found = {"prompt": number, "position": position, "token_id": prompt.ids[position], "token": token}
                found |= {"layer": layer.name, "index": index, "kind": layer.kind}
                found |= {"cosine": _number(cosine[position]), "norm_ratio": _number(ratio[position])}
                found |= {"angle": _angle(cosine[position])}
                rows.append(found | dict(zip(("alpha", "branch_cosine", "branch_distance"), at, strict=True)))
    return rows


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _angle(cosine: float) -> float | None:
    """In degrees; what rounding of a cosine is, 1e-6 degrees, is 0."""
    return None if math.isnan(cosine) else round(math.degrees(math.acos(cosine)), 5)


def _layer(layers: list[Layer], index: int, rows: list[Json], base: list[Taken], tuned: list[Taken]) -> Json:
    """Means over tokens, and CKA."""
    own = [row for row in rows if row["index"] == index]
    told: Json = {"layer": layers[index].name, "kind": layers[index].kind}
    for name in ("cosine", "angle", "norm_ratio"):
        values = [row[name] for row in own if row[name] is not None]
        told[name] = fmean(values) if values else None
    angles = [row["angle"] for row in own if row["angle"] is not None]
    return told | {"angle_max": max(angles, default=None), "cka": linear_cka(*_samples(index, base, tuned))}


def _samples(index: int, base: list[Taken], tuned: list[Taken]) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's states over all prompts, less each prompt's first token where enough are left.

    On it models put activations hundreds of times larger than on others (Sun et al. 2024): it alone would decide.
    """
    states = [[taken.states(index) for taken in side] for side in (base, tuned)]
    first = 1 if sum(len(one) - 1 for one in states[0]) >= FEWEST else 0
    before, after = (torch.cat([one[first:] for one in side]) for side in states)
    return before, after


def _sites(layers: list[Layer], tuned: list[Taken]) -> list[Json]:
    found = []
    for layer in tuned[0].sites:
        alphas = torch.cat([taken.sites[layer].alpha for taken in tuned])
        told: Json = {"layer": layers[layer + 1].name, "index": layer + 1, "alpha": alphas.mean().item()}
        told |= {"alpha_min": alphas.min().item(), "alpha_max": alphas.max().item()}
        for name in ("cosine", "distance"):
            told[name] = torch.cat([getattr(taken.sites[layer], name) for taken in tuned]).mean().item()
        maps = [heads for taken in tuned if (heads := taken.attention[layer]) is not None]
        told["attention"] = [fmean(head) for head in zip(*maps, strict=True)] if maps else None
        found.append(told)
    return found


def _prompt(prompt: Prompt, base: Taken, tuned: Taken, *, layers: list[Layer], tokenizer: Any) -> Json:
    kl = divergence(base.final(), tuned.final()).tolist()
    start = len(prompt.ids) - len(kl)
    followed = []
    for position, far in enumerate(kl):
        sides = {}
        for name, taken in (("base", base), ("tuned", tuned)):
            sides[name] = [_words(row, tokenizer) for row in taken.lens[position]]
        followed.append({"position": start + position, "kl": max(far, 0.0), **sides})
    told = {"where": prompt.where, "ids": prompt.ids, "tokens": prompt.tokens, "cut": prompt.cut, "lens": followed}
    told["importance"] = {"of": visible(tokenizer.decode([tuned.target]))}
    told["importance"] |= {"base": base.importance, "tuned": tuned.importance}
    attention = {layers[layer + 1].name: heads for layer, heads in tuned.attention.items()}
    return told | {"attention": attention}


def _words(row: Json, tokenizer: Any) -> Json:
    return {"top": [visible(tokenizer.decode([i])) for i in row["ids"]], "p": row["p"], "kl": row["kl"]}
