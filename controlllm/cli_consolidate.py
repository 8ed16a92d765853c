"""The command that writes a model: a run's by a recipe, or that of any trainer's checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from controlllm.errors import UserError

Source = Annotated[str, typer.Argument(metavar="RECIPE|SRC", help="A recipe; or a checkpoint's folder.")]
More = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE|DST", help="Changes to a recipe; or the new folder.")
]
Run = Callable[[str, list[str] | None], None]


def add_commands(app: typer.Typer, run_stage: Run, panel: str) -> None:
    """`run_stage` runs the pipeline up to this stage."""

    def consolidate(
        source: Source,
        more: More = None,
        base: Annotated[str | None, typer.Option("--base", metavar="FOLDER", help="The base model of SRC.")] = None,
        form: Annotated[str | None, typer.Option("--form", metavar="expanded|folded")] = None,
        alpha: Annotated[str | None, typer.Option("--alpha", metavar="mean|0..1", help="Of a folded form.")] = None,
        dtype: Annotated[str | None, typer.Option("--dtype", metavar="float32|bfloat16|base")] = None,
        copy: Annotated[bool, typer.Option("--copy", help="Copy the base's files instead of linking them.")] = False,
    ) -> None:
        """Write the tuned model as a Hugging Face folder: of a recipe's run, or of any trainer's checkpoint.

        SRC is a run or one of its checkpoints, a checkpoint of DeepSpeed's ZeRO, torch's FSDP or DCP (the prior
        implementation's, too), or an adapter of PEFT. Nothing in a pickle is run.

        Example: `controlllm consolidate workflows/recipes/demo.yaml export.dtype=base`

        Example: `controlllm consolidate out/global_step100 mine --base meta-llama/Llama-3.1-8B`

        Next: `controlllm benchmark`, or `controlllm chat DST`
        """
        options = {"form": form, "alpha": alpha, "dtype": dtype, "frozen": "copy" if copy else None}
        given = {name: value for name, value in options.items() if value is not None}
        target = more[0] if more and len(more) == 1 and "=" not in more[0] else None
        if target is None and not Path(source).is_dir():
            if name := next(iter([*given, *(["base"] if base else [])]), None):
                said = "base is for a checkpoint" if name == "base" else f"write export.{name}=VALUE behind a recipe"
                raise UserError(f"--{'copy' if name == 'frozen' else name}: {said}")
            run_stage(source, more)
            return
        if target is None:
            raise UserError(f"{source}: is a folder; name the new one, too: controlllm consolidate {source} DST")
        from controlllm.consolidate.foreign import export

        made = export(Path(source), Path(target), base=Path(base) if base else None, how=_config(given))
        print(f"{made}\nnext: controlllm benchmark {target} --suite offline")

    app.command("consolidate", rich_help_panel=panel)(consolidate)


def _config(given: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from controlllm.config import ExportConfig

    try:
        if given.get("alpha", "mean") != "mean":
            given["alpha"] = float(given["alpha"])
        return ExportConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"--{first['loc'][0]}: " if first["loc"] else ""
        raise UserError(f"{where}{first['msg'].removeprefix('Value error, ')}, found {first['input']!r}") from None
    except ValueError:
        raise UserError(f"--alpha: {given['alpha']!r} is neither mean nor a number between 0 and 1") from None
