"""The command of the smoke test: a run's model by a recipe, or one checkpoint by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from controlllm.errors import UserError

Target = Annotated[str, typer.Argument(metavar="RECIPE|CKPT", help="A recipe; or a model's folder, to test it.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to a recipe.")]
Run = Callable[[str, list[str] | None], None]


def add_commands(app: typer.Typer, run_stage: Run, panel: str) -> None:
    """`run_stage` runs the pipeline up to this stage."""

    def smoke(
        target: Target,
        overrides: Overrides = None,
        prompts: Annotated[int | None, typer.Option("--prompts", min=1, help="Of the project's 256.")] = None,
        max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="For each.")] = None,
        endpoint: Annotated[
            bool | None, typer.Option("--endpoint/--no-endpoint", help="Ask through the openai client, too.")
        ] = None,
        timeout: Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", help="Of the engine.")] = None,
    ) -> None:
        """Load a model in vLLM's own server and compare its tokens with those of transformers.

        With a recipe its tuned model, after the stages before; or any checkpoint. What was looked at is on the page
        smoke.html.

        Example: `controlllm smoke workflows/recipes/demo.yaml smoke.prompts=4`

        Example: `controlllm smoke runs/demo/model --prompts 256`

        Next: `controlllm report`, or `controlllm serve CKPT`
        """
        given = {"prompts": prompts, "max_new_tokens": max_new_tokens, "endpoint": endpoint, "timeout_seconds": timeout}
        own = {name: value for name, value in given.items() if value is not None}
        place = Path(target)
        if place.is_dir() or not (place.is_file() or place.suffix in (".yaml", ".yml")):
            if overrides:
                raise UserError(f"{overrides[0]}: a checkpoint has no recipe to change; see controlllm smoke --help")
            _test(place, own)
            return
        if own:
            name = next(iter(own))
            raise UserError(f"{_option(name)} is for a checkpoint; with a recipe write smoke.{name}=VALUE behind it")
        run_stage(target, overrides)

    app.command("smoke", rich_help_panel=panel)(smoke)


def _test(checkpoint: Path, own: dict[str, Any]) -> None:
    import json

    from pydantic import ValidationError

    from controlllm.config import SmokeConfig
    from controlllm.servable import check_servable
    from controlllm.smoke.stage import smoke

    try:
        config = SmokeConfig.model_validate(own)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{_option(str(first['loc'][0]))}: {first['msg']}") from None
    check_servable(checkpoint)
    made = smoke(checkpoint.resolve(), None, config).path
    _print(json.loads((made / "smoke.json").read_text()))
    print(made / "smoke.html")


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "", "found", show_edge=False)
    for one in summary["checks"]:
        table.add_row(one["name"], one["result"], escape(one["said"]))
    memory = summary["memory"]
    table.add_row("speed", "", f"{summary['tokens_per_second']:.1f} tokens/s, {summary['prompts']} prompts at once")
    table.add_row("first token", "", f"after {1000 * summary['first_token_seconds']:.0f} ms")
    table.add_row("memory", "", f"{memory['resident'] / 1e9:.2f} GB, of it KV cache {memory['kv_cache'] / 1e9:.2f} GB")
    Console(highlight=False).print(table)


def _option(name: str) -> str:
    return "--timeout" if name == "timeout_seconds" else f"--{name.replace('_', '-')}"
