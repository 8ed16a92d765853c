"""How much of each twin a folded model has."""

from collections.abc import Callable
from typing import Any

from controlllm.config.export import ExportConfig
from controlllm.control.expand import settings_of
from controlllm.control.fold import check_foldable, measure_alphas, pairs, site_alphas
from controlllm.progress import track


def alphas_for(export: ExportConfig, load: Callable[[], Any], tokenizer: Any) -> Callable[[Any], dict[int, float]]:
    """(expanded model, with or without weights) → weight of each twin by base layer; UserError where it has no form.

    load: gives the model with all its weights, for interpolations that weigh each token by itself: the mean over the
    held-out probes' texts is measured then.
    """

    def chosen(model: Any) -> dict[int, float]:
        settings = check_foldable(settings_of(model))
        if export.alpha != "mean":
            return dict.fromkeys(pairs(model), float(export.alpha))
        known = site_alphas(model)
        if None not in known.values():
            return {site: settings.alpha_scale * alpha for site, alpha in known.items() if alpha is not None}
        from controlllm.distance import batches, read_documents

        documents, whole = read_documents(None, tokenizer)[0::2], load().eval()
        with track("calibrate", total=len(documents), unit="texts") as advance:
            return measure_alphas(whole, (inputs for _, inputs in batches(documents, whole.device, advance)))

    return chosen
