"""Commands about training: memory."""

from typing import Annotated, Any

import typer

from controlllm.errors import UserError

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe, such as workflows/recipes/demo.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it.")]
GIGABYTE = 10**9


def add_commands(app: typer.Typer) -> None:
    app.command("memory", rich_help_panel="Before a run")(memory)


def memory(
    recipe: Recipe,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Of the whole run, one per device.")] = 1,
    per_node: Annotated[int | None, typer.Option("--per-node", min=1, help="On one machine; all by default.")] = None,
    device_memory: Annotated[
        float | None,
        typer.Option("--device-memory", metavar="GB", min=0, help="Of one GPU; by default this machine's."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON object instead of tables.")] = False,
) -> None:
    """Predict the memory that training needs at its worst moment, what takes it, and what other settings would give.

    The device is a GPU of --device-memory; without it this machine's, or its own memory where it has no GPU.

    Example: `controlllm memory workflows/recipes/demo.yaml train.micro_batch_size=2 --processes 8 --device-memory 80`

    Next: `controlllm train workflows/recipes/demo.yaml`
    """
    from controlllm.base_model import hub_shape
    from controlllm.config import load_config
    from controlllm.memory import Machine, changes, predict, this_machine
    from controlllm.model_shape import model_shape

    config = load_config(recipe, *(overrides or []))
    shape = model_shape(config.model.name, revision=config.model.revision) or hub_shape(config.model)
    if shape is None:
        raise UserError(f"model.name: '{config.model.name}' has no config.json on the Hugging Face Hub")
    machine = this_machine() if device_memory is None else Machine("cuda", 1, int(device_memory * GIGABYTE))
    now = predict(shape, config, processes=processes, device=machine.device)
    others = changes(shape, config, processes=processes, device=machine.device)
    if json:
        _print_json(now, others, machine)
        return
    print(f"{config.name}: {config.model.name}, {_processes(processes)}, one device each; GB of 10^9 bytes\n")
    _print_parts("device" if machine.device == "cuda" else "training", now.device)
    _print_parts("host", now.host)
    if (here := min(per_node or processes, processes)) > 1:
        print(f"host of {here} processes: {_gb(here * now.host.total)}\n")
    _print_changes(now, others, machine)
    print(_verdict(now, machine))


def print_deepspeed(config: Any, processes: int) -> None:
    import json

    from controlllm.train.zero_config import zero_config

    if config.train.parallel.kind != "deepspeed":
        raise UserError("--deepspeed: this recipe is not for DeepSpeed; set train.parallel.kind to deepspeed")
    print(json.dumps(zero_config(config.train, processes=processes), indent=2))


def _print_json(now: Any, others: list[Any], machine: Any) -> None:
    import json

    from controlllm.memory import peak

    def told(parts: Any) -> dict[str, Any]:
        return {"total": parts.total, "moment": parts.moment, "parts": dict(parts.bytes)}

    needed = peak(now, machine)
    print(
        json.dumps({
            "device": told(now.device), "host": told(now.host), "kind": machine.device, "available": machine.bytes,
            "fits": None if machine.bytes is None else needed <= machine.bytes,
            "changes": [{"set": change.overrides, "device": change.memory.device.total} for change in others],
        })
    )  # fmt: skip


def _print_parts(title: str, parts: Any) -> None:
    rows = [(name, _gb(size)) for name, size in sorted(parts.bytes.items(), key=lambda part: -part[1])]
    _table([*rows, ("sum", _gb(parts.total))], title=f"{title}: {parts.moment}")


def _print_changes(now: Any, others: list[Any], machine: Any) -> None:
    from controlllm.memory import peak

    def line(change: Any) -> tuple[str, str, str]:
        needed = peak(change.memory, machine)
        return " ".join(change.overrides), _gb(needed), f"{(needed - peak(now, machine)) / GIGABYTE:+.2f}"

    if others:
        _table([line(change) for change in others], title="with one other setting")


def _verdict(now: Any, machine: Any) -> str:
    from controlllm.memory import peak

    needed = peak(now, machine)
    if machine.bytes is None:
        return f"needs {_gb(needed)} GB; give --device-memory to see whether that fits"
    if needed <= machine.bytes:
        return f"fits: {_gb(needed)} of {_gb(machine.bytes)} GB"
    return f"does not fit: {_gb(needed)} of {_gb(machine.bytes)} GB"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _gb(size: int) -> str:
    return f"{size / GIGABYTE:.2f}"


def _table(rows: list[tuple[str, ...]], *, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for number, _ in enumerate(rows[0]):
        table.add_column(justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    print(title)
    Console(highlight=False, markup=False).print(table)
    print()
