"""probe.html: the figures and the prompts' coloured text on one page that needs nothing from elsewhere."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from controlllm.probe.figures import Drawing
from controlllm.probe.token_figures import shares

Json = dict[str, Any]


def render(result: Json, figures: list[Drawing]) -> str:
    """Text of models is escaped by the template."""
    environment = Environment(
        loader=PackageLoader("controlllm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = result["prompts"][: result["settings"]["drawn"]]
    prompts = [
        {
            "number": number,
            "where": prompt["where"],
            "of": prompt["importance"]["of"],
            "cut": prompt["cut"],
            "texts": {name: _coloured(prompt, name) for name in ("base", "tuned")},
            "figures": [f for f in figures if f.prompt == number and f.kind != "importance"],
        }
        for number, prompt in enumerate(drawn, start=1)
    ]
    return environment.get_template("probe.html").render(
        result=result, overall=[f for f in figures if f.kind == "layers"], prompts=prompts
    )


def _coloured(prompt: Json, model: str) -> list[Json]:
    """Each token, how strong its colour is (0..75 %), and whether it speaks for the prediction."""
    found = shares(prompt["importance"][model])
    most = max(max(map(abs, found)), 1e-9)
    return [
        {"token": token, "strength": round(75 * abs(share) / most), "up": share >= 0, "share": share}
        for token, share in zip(prompt["tokens"], found, strict=True)
    ]
