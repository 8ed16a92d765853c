"""The command that talks to a checkpoint: chat."""

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Checkpoints"


def add_commands(app: typer.Typer) -> None:
    app.command("chat", rich_help_panel=PANEL)(chat)


def chat(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A model's folder, a run, a training checkpoint or an adapter.")
    ],
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="transformers|vllm", help="vllm on a GPU if there, by default.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", metavar="0..1", help="The dial: 0 is the base, 1 the tuned model.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answers of the base beside the tuned model's.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", metavar="FOLDER", help="The base model, where it is not known.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="The same draws again.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="float32|bfloat16|float16", help="By default the checkpoint's.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Print the answer to this, and end.")
    ] = None,
) -> None:
    """Talk to a checkpoint of any stage; beside its base with --compare, at any point between both with --alpha.

    At a terminal /help lists what can be done while talking. Elsewhere every line of the input is a turn, and only
    answers are printed.

    Example: `controlllm chat runs/demo/model --compare`

    Example: `controlllm chat runs/demo --prompt "What is 12 + 30?"`

    Next: `/save chat.jsonl` in the chat, which `controlllm prepare` can train on
    """
    from controlllm.chat.settings import Sampling
    from controlllm.errors import UserError

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype: '{dtype}' is none of float32, bfloat16, float16")
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    from controlllm.chat.opening import Wish
    from controlllm.chat.repl import Stopped
    from controlllm.chat.run import chat as talk

    try:
        talk(
            checkpoint,
            sampling=sampling,
            wish=Wish(backend, dtype),
            system=system,
            alpha=alpha,
            compare=compare,
            base=None if base is None else Path(base),
            prompt=prompt,
        )
    except KeyboardInterrupt:
        raise Stopped("stopped by Ctrl-C") from None
