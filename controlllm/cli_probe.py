"""The command that looks inside a checkpoint: probe."""

from typing import Annotated, Any

import typer

from controlllm.errors import UserError

PANEL = "After a run"


def add_commands(app: typer.Typer) -> None:
    app.command("probe", rich_help_panel=PANEL)(probe)


def probe(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A tuned model, such as runs/demo/model.")],
    prompts: Annotated[str, typer.Option("--prompts", metavar="FILE", help=".txt, .jsonl, or - for standard input.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="FOLDER", help="Of a plain model: the one it was made from.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="FOLDER", help="By default probe/ beside CKPT.")] = None,
    items: Annotated[int | None, typer.Option("--items", help="Prompts, the first of the file.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Of a prompt; longer ones are cut.")] = None,
    drawn: Annotated[int | None, typer.Option("--drawn", help="Prompts drawn token by token.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="float32|bfloat16|float16", help="By default the checkpoint's.")
    ] = None,
    tensorboard: Annotated[str | None, typer.Option("--tensorboard", metavar="DIR", help="Log there, too.")] = None,
) -> None:
    """Look inside a tuned model beside its base: where it moved, at which token, and what it looks at.

    A prompt per line of a .txt; rows of a .jsonl have `prompt`, or `messages` that the chat template writes. Drift of
    hidden states and CKA by layer, alpha and attention of both branches at each site, logit lens, token importance.

    Example: `controlllm probe runs/demo/model --prompts prompts.txt`

    Next: open `runs/demo/probe/probe.html`
    """
    given = {"prompts": prompts, "items": items, "tokens": tokens, "drawn": drawn, "dtype": dtype}
    config = _config(given)
    from controlllm.probe import probe as look

    look(checkpoint, config, base=base, to=to, tensorboard=tensorboard)


def _config(given: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from controlllm.config import ProbeConfig

    try:
        return ProbeConfig.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]}: {first['msg']}, found {first['input']!r}") from None
