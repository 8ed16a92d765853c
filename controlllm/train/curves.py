"""One run's curves in TensorBoard, Weights & Biases and MLflow, opened so that they go on where they are.

Through accelerate's trackers, without an Accelerator.
"""

import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from controlllm.config import MetricsConfig

MARGIN = 64
"""Lines that are sent to TensorBoard again: more than a killed process can have kept back."""
TAG = "controlllm.run"
BLOCK = 32768
SPEED = ("seconds", "data_seconds", "tokens_per_second", "tflops", "mfu", "memory_gb")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """What a tracker knows a run by."""

    name: str
    key: str
    """The same for every process that goes on with this run, and for no other run."""
    settings: dict[str, Any]
    """By dotted name."""


@dataclass(frozen=True)
class History:
    """What was written before this process began."""

    rows: list[dict[str, Any]]
    """Lines that stay."""
    first: int = 0
    """Number of the first of them."""
    known: int = 0
    """Number of the line after the last that was ever written, those included that are made again."""
    step: int = 0
    """Of the checkpoint; 0 for a new run."""


class Curves(NamedTuple):
    """An open tracker of accelerate."""

    tracker: Any
    has: Callable[[int, Row], bool]
    """Whether it needs no more of a line, by the line's number and content."""
    log: Callable[[int, Row], None]
    where: str


def named(row: Row) -> dict[str, float]:
    """A line's values by group: train/loss, train/alpha/3, speed/mfu, validation/loss, retention/kl."""
    group = "train" if "tokens" in row else "validation"
    values: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            values |= {f"{group}/{name}/{key}": float(part) for key, part in value.items()}
        elif value is not None and name != "step":
            values[_grouped(name, group)] = float(value)
    return values


def _grouped(name: str, group: str) -> str:
    head, _, rest = name.partition("_")
    if group == "train":
        return f"{'speed' if name in SPEED else group}/{name}"
    return f"{head}/{rest}" if head in ("validation", "retention") else f"{group}/{name}"


def _tensorboard(folder: Path, config: MetricsConfig, run: RunFacts, history: History) -> Curves:
    """Readers leave out what was logged before for steps from purge_step on; that is logged again."""
    from accelerate.tracking import TensorBoardTracker

    target = folder / "tensorboard"
    seen = any(target.glob("events.out.tfevents.*"))
    again = history.rows[-MARGIN:]
    purge = again[0]["step"] if again else history.step and history.step + 1
    tracker = _opened(TensorBoardTracker("", str(target), purge_step=purge if seen else None))
    if not seen:
        tracker.store_init_configuration(_plain(run.settings))
    since = max(0, len(history.rows) - MARGIN) + history.first if seen else 0
    # Lines of the step that is purged first, which stand before the margin.
    while seen and since > history.first and history.rows[since - 1 - history.first]["step"] >= purge:
        since -= 1
    return Curves(
        tracker,
        has=lambda number, row: number < since,
        log=lambda number, row: tracker.log(named(row), step=row["step"]),
        where=f"{target} (tensorboard --logdir {target})",
    )


def _wandb(folder: Path, config: MetricsConfig, run: RunFacts, history: History) -> Curves:
    """Its own step is a line's number, which it will not take twice; the curves are drawn over the lines' step."""
    import wandb  # type: ignore[import-not-found]
    from accelerate.tracking import WandBTracker

    identity = hashlib.sha256(run.key.encode()).hexdigest()[:24]
    quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
    kept = _kept_offline(folder / "wandb", identity, history)  # before another file stands beside them
    tracker = _opened(
        WandBTracker(config.project, id=identity, name=run.name, resume="allow", dir=str(folder), settings=quiet)
    )
    tracker.tracker.define_metric("*", step_metric="step")
    tracker.store_init_configuration(_plain(run.settings))
    offline = tracker.tracker.offline
    since = kept if offline else tracker.tracker.starting_step
    at = f"offline in {folder / 'wandb'} (wandb sync {folder / 'wandb'}/offline-run-*)"
    return Curves(
        tracker,
        has=lambda number, row: number < since,
        log=lambda number, row: tracker.log({"step": row["step"], **named(row)}, step=number, commit=True),
        where=at if offline else f"{tracker.tracker.url}",
    )


def _mlflow(folder: Path, config: MetricsConfig, run: RunFacts, history: History) -> Curves:
    """The run with this key's tag goes on; of every group of curves the server says which step it has."""
    import mlflow  # type: ignore[import-not-found]
    from accelerate.tracking import MLflowTracker

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(config.project)
    key = run.key.replace("'", "")
    runs = client.search_runs([experiment.experiment_id], f"tags.`{TAG}` = '{key}'") if experiment else []
    last = _last_steps(client, runs[0]) if runs else {}
    artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (folder / "mlartifacts").as_uri()
    tracker = _opened(
        MLflowTracker(
            config.project,
            logging_dir=artifacts,
            run_id=runs[0].info.run_id if runs else None,
            run_name=run.name,
            tags={TAG: key},
        )
    )
    if not runs:
        tracker.store_init_configuration(_plain(run.settings))
    return Curves(
        tracker,
        has=lambda number, row: all(row["step"] <= last.get(name.partition("/")[0], -1) for name in named(row)),
        log=lambda number, row: tracker.log(named(row), step=row["step"]),
        where=f"{without_password(mlflow.get_tracking_uri())}, experiment {config.project}, run {run.name}",
    )


OPEN: dict[str, Callable[[Path, MetricsConfig, RunFacts, History], Curves]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def without_password(text: str) -> str:
    """Without the user and password of addresses in it."""
    return re.sub(r"://[^/@\s]+@", "://", text)


def _opened(tracker: Any) -> Any:
    from accelerate import PartialState

    PartialState()  # accelerate's log messages refuse to work without it
    tracker.start()
    return tracker


def _kept_offline(folder: Path, identity: str, history: History) -> int:
    """Number of the line after the last that is in W&B's files: a killed process leaves their last block unwritten."""
    files = list(folder.glob(f"offline-run-*-{identity}*/*.wandb"))
    if not files:  # they were sent to a server and cleaned up
        return history.known
    return max((number + 1 for file in files for number, _ in offline_history(file)), default=0)


def offline_history(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and values of the lines in a file of W&B, as far as it is whole.

    It is a LevelDB log: blocks of 32 KiB with records of checksum, length and kind (1 whole, 2 first, 3 middle, 4 last
    part), the first of them after seven bytes.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[import-not-found]

    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if place > len(data) or kind not in (1, 2, 3, 4):
            return
        if kind in (2, 3):
            continue
        try:
            record = Record.FromString(parts)
        except DecodeError:
            return
        parts = b""
        if record.WhichOneof("record_type") == "history":
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            yield record.history.step.num, items


def _last_steps(client: Any, run: Any) -> dict[str, int]:
    """The last step of every group of curves."""
    of_group = {name.partition("/")[0]: name for name in run.data.metrics}
    return {
        group: max(entry.step for entry in client.get_metric_history(run.info.run_id, name))
        for group, name in of_group.items()
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What every tracker takes as a setting."""
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
