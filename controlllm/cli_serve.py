"""The command that serves a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    app.command(
        "serve",
        rich_help_panel="Checkpoints",
        context_settings={"allow_extra_args": True},
    )(serve)


def serve(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A model's folder, such as runs/demo/model.")],
    host: Annotated[str, typer.Option("--host", help="Address; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="float32|bfloat16|float16", help="The checkpoint's by default.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, help="Tokens of a request with its answer.")
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", metavar="N", min=1, help="GPUs that share it.")
    ] = 1,
    alpha: Annotated[
        float | None, typer.Option("--alpha", min=0, max=1, help="The dial: 0 is the base, 1 the trained model.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and stop.")] = False,
) -> None:
    """Serve a checkpoint with vLLM as OpenAI's API, until Ctrl-C or SIGTERM. What stands behind -- goes to vLLM.

    Any checkpoint: expanded ones natively, folded and plain ones as their family. Sampling defaults are the
    checkpoint's (generation_config.json).

    Example: `controlllm serve runs/demo/model --port 8000`

    Example: `controlllm serve runs/demo/model --alpha 0.5 -- --api-key KEY --max-num-seqs 64`

    Next: the line that it prints when it is ready; k8s/serve for a cluster
    """
    import shlex

    from controlllm.serve import serve as run
    from controlllm.serving import Serving, check, command, environment

    serving = Serving(
        checkpoint,
        host=host,
        port=port,
        dtype=dtype,
        max_model_len=max_model_len,
        tensor_parallel=tensor_parallel,
        alpha=alpha,
        extra=tuple(context.args),
    )
    if dry_run:
        check(serving)
        names = [f"{name}={value}" for name, value in environment().items()]
        print(shlex.join(["env", *names, *command(serving)]))
        return
    raise typer.Exit(run(serving))
