"""Commands over a checkpoint instead of a recipe: dial, fold, import-reference."""

from typing import Annotated

import typer

from controlllm.errors import UserError

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A tuned model, such as runs/demo/model.")]
New = Annotated[str | None, typer.Option("--new", metavar="A,B", help="Probes of the skill that was learned.")]
Old = Annotated[str | None, typer.Option("--old", metavar="A,B", help="Probes of what must not be forgotten.")]
Items = Annotated[int | None, typer.Option("--items", min=1, help="Items per probe; all when left out.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Items at a time.")]
PANEL = "Checkpoints"


def add_commands(app: typer.Typer) -> None:
    app.command("dial", rich_help_panel=PANEL)(dial)
    app.command("fold", rich_help_panel=PANEL)(fold)
    app.command("import-reference", rich_help_panel=PANEL)(import_reference)


def dial(
    checkpoint: Checkpoint,
    grid: Annotated[str, typer.Option("--grid", metavar="0,0.5,1", help="Shares of what was learned.")] = (
        "0,0.25,0.5,0.75,1"
    ),
    new: New = None,
    old: Old = None,
    items: Items = None,
    batch_size: BatchSize = None,
    output: Annotated[str | None, typer.Option("--output", help="Folder; by default dial/ beside CKPT.")] = None,
) -> None:
    """Score a tuned model between its base (0) and itself (1), and draw what is gained and lost.

    Without training: the weight of what was learned is scaled. Points that were scored before come from the cache.

    Example: `controlllm dial runs/demo/model --grid 0,0.5,1 --items 40`

    Next: `controlllm.load("runs/demo/model", alpha_scale=0.5)` in Python
    """
    from controlllm.dial import dial as score

    score(
        checkpoint, _numbers(grid), new=_names(new), old=_names(old), items=items, batch_size=batch_size, output=output
    )


def fold(
    checkpoint: Checkpoint,
    output: Annotated[str, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    alpha: Annotated[
        str, typer.Option("--alpha", metavar="mean|FILE|0..1", help="Weight of the twins; a FILE has {layer: weight}.")
    ] = "mean",
    other: Annotated[str | None, typer.Option("--with", metavar="CKPT", help="Another run over the same base.")] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="FILE", help=".txt or .jsonl to measure on.")] = None,
    new: New = None,
    old: Old = None,
    items: Items = None,
    batch_size: BatchSize = None,
) -> None:
    """Fold every pair of blocks into one: the base's plain architecture, at its cost, without controlllm.

    Says how far the folded model is from the unfolded one; with --new and --old it scores both, too.

    Example: `controlllm fold runs/demo/model folded --new puzzles --old prose --items 40`

    Next: `vllm serve folded`
    """
    from controlllm.fold import fold as folded

    names = {"new": _names(new), "old": _names(old), "items": items, "batch_size": batch_size}
    folded(checkpoint, output, alpha=_number_or_text(alpha), other=other, text=text, **names)


def import_reference(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint of the prior implementation.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A folder that does not exist yet.")],
    base_family: Annotated[
        str | None, typer.Option("--base-family", metavar="llama|qwen2|mistral|...", help="If SRC does not say.")
    ] = None,
) -> None:
    """Rewrite a checkpoint of the prior Control LLM implementation (ControlLLM/* on the Hub) as one of ours.

    Tensor by tensor: memory stays below the size of its largest file.

    Example: `controlllm import-reference Control-LLM-Llama3.1-8B mine --base-family llama`

    Next: `controlllm dial mine`
    """
    from controlllm.control.reference import import_reference as rewrite

    print(f"{rewrite(source, target, base_family=base_family)}\nnext: controlllm dial {target}")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--grid: '{text}' must be numbers between 0 and 1, such as 0,0.5,1") from None


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
