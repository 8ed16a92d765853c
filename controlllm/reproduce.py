"""A run once more: its recipe and commands as files, what is other here, and whether the numbers come out again."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from controlllm import __version__
from controlllm.card import code, escaped, versions
from controlllm.changes import differences
from controlllm.config import RunConfig
from controlllm.errors import UserError
from controlllm.inputs_here import Input, compare_inputs
from controlllm.recipe import Source, write
from controlllm.record import FILE, Record, open_record

Json = dict[str, Any]
RUNS, CACHE = "runs", "cache"
EXACT = 1e-9
"""Two numbers that differ by less are equal: they were written by the same sums."""


def reproduce(target: Path, folder: Path | None = None) -> tuple[Path, list[Input]]:
    """Write recipe.yaml, README.md, constraints.txt and record.json; returns their folder and every input, compared.

    folder: `reproduce/` in the run's folder when left out. Raises UserError for what is no run, or one whose settings
    this version does not know.
    """
    record = open_record(target)
    if not record.config or record.folder is None:
        raise UserError(f"{target}: is a checkpoint by itself, without its recipe; give the run's folder, runs/<name>")
    folder = folder or (record.folder if (record.folder / FILE).is_file() else record.folder / "reproduce")
    config = _config(record, target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(write(config.model_dump(mode="json")), encoding="utf-8")
        (folder / "constraints.txt").write_text("".join(f"{n}=={_plain(v)}\n" for n, v in versions(record).items()))
        (folder / "README.md").write_text(_readme(record, config), encoding="utf-8")
        (folder / FILE).write_text(json.dumps(record.to_json(), indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another with --to") from None
    return folder, compare_inputs(record, config)


def run_again(folder: Path) -> list[str]:
    """Run the recipe in a store of its own, where nothing is cached; returns a line per number, worst first.

    Raises UserError if a command fails, or if a number is outside the recorded interval: `differs` stands first then.
    """
    record = open_record(folder)
    environment = os.environ | {"CONTROLLLM_CACHE": str((folder / CACHE).absolute())}
    for command in commands(record, folder / "recipe.yaml", folder / RUNS):
        code = subprocess.run([sys.executable, "-m", *command], env=environment, check=False).returncode  # noqa: S603
        if code != 0:
            raise UserError(f"python -m {shlex.join(command)} ended with code {code}; what it printed says why")
    again = open_record(folder / RUNS / record.config["name"])
    return compare_numbers(record.tasks, again.tasks)


def compare_numbers(recorded: Json, again: Json) -> list[str]:
    """`equal`, `within` the recorded interval, or `differs`, for each task and end; the last first."""
    lines = []
    for name, task in recorded.items():
        if (other := again.get(name)) is None:
            lines.append(f"differs: {name} was not measured again")
            continue
        for metric, change in (task.get("metrics") or {task["metric"]: task}).items():
            found = (other.get("metrics") or {other["metric"]: other})[metric]
            lines.append(_compared(f"{name} {metric}", change, found))
    order = ("differs", "within", "equal")
    return sorted(lines, key=lambda line: order.index(line.partition(":")[0]))


def commands(record: Record, recipe: Path | str, output: Path | str) -> list[list[str]]:
    """From nothing to the report, behind `python -m`; training in as many processes as it was."""
    again = [str(recipe), f"output={output}"]
    processes = _processes(record)
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "controlllm.cli", "train"]
    return ([[*launch, *again]] if processes > 1 else []) + [["controlllm.cli", "finetune", *again]]


def _processes(record: Record) -> int:
    return record.made.get("train/train.json", {}).get("processes", 1)


def _compared(what: str, recorded: Json, found: Json) -> str:
    said = f"{what}: after {recorded['after']:.6g} → {found['after']:.6g}, change {recorded['difference']:+.6g} → "
    said += f"{found['difference']:+.6g}"
    if all(abs(recorded[end] - found[end]) <= EXACT for end in ("before", "after")):
        return f"equal: {said}"
    low, high = recorded.get("low"), recorded.get("high")
    if low is not None and high is not None and low <= found["difference"] <= high:
        return f"within: {said}, recorded interval [{low:.6g}, {high:.6g}]"
    return f"differs: {said}"


def _config(record: Record, target: Path) -> RunConfig:
    """The recipe, which must say the same as what was recorded."""
    from controlllm.config.run import validate

    config = validate(record.config, Source(file=f"{target}: the recorded recipe"))
    known = differences({}, record.config)
    other = differences(record.config, config.model_dump(mode="json", exclude={"output"}))
    if changed := [name for name in other if name in known and name != "output"]:
        raise UserError(f"{target}: this version of controlllm reads the recorded {changed[0]} otherwise; use that one")
    return config


def _plain(version: str) -> str:
    """Without the build, such as +cpu, which no registry has under that name."""
    return version.partition("+")[0]


def _readme(record: Record, config: RunConfig) -> str:
    seeds = {"train.seed": config.train.seed, "mix.seed": config.mix.seed}
    seeds |= {f"mix.datasets.{n}.seed ({d.name})": d.seed for n, d in enumerate(config.mix.datasets)}
    listed = record.stages.get("ingest data", {"inputs": {}})["inputs"]
    sources = {name.removeprefix("source."): v for name, v in listed.items() if name.startswith("source.")}
    packages = versions(record)
    lines = [
        f"# {escaped(record.name)}, once more",
        "",
        escaped(record.summary.get("headline", "")),
        "",
        "```sh",
        f"pip install -c constraints.txt controlllm=={__version__} {' '.join(packages)}",
        "controlllm reproduce .   # what is other on this machine; nothing is run",
        *(f"python -m {shlex.join(command)}" for command in commands(record, "recipe.yaml", RUNS)),
        "```",
        "",
        "`controlllm reproduce . --run` does the last steps in a store of its own and compares the numbers.",
        "Run it where the recipe's relative paths, if it has any, mean what they meant then.",
        "",
        "| Input | |",
        "| --- | --- |",
        *(f"| {escaped(name)} | {code(value)} |" for name, value in seeds.items()),
        f"| processes of the training | {_processes(record)} |",
        *(f"| files of the data {escaped(name)} | {code(value)} |" for name, value in sources.items()),
        *(f"| result of {escaped(name)} | {code(value)} |" for name, value in record.results.items()),
        *(f"| {escaped(name)} | {code(value)} |" for name, value in packages.items()),
        "",
    ]
    return "\n".join(lines)
