"""Lines are exact means, a resumed run writes those of an uninterrupted one, and so do its curves elsewhere."""

import json
import math
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from controlllm.config import ControlConfig, MetricsConfig
from controlllm.control.expand import control_blocks
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.train.curves import RunFacts, named, offline_history, without_password
from controlllm.train.distributed import World
from controlllm.train.metrics import Metrics, StepRecord, alphas
from controlllm.train.trackers import missing_trackers

RUN = RunFacts("tiny", "runs/tiny-0123", {"train.lr": 0.001, "mix.datasets": ["puzzles"], "control": None})
WALL = ("seconds", "data_seconds", "tokens_per_second", "tflops", "mfu", "memory_gb")
STEPS, EVERY = 8, 3


def record(step, **changes) -> StepRecord:
    """Another one for every step."""
    values = {
        "step": step, "lr": 1e-3 / step, "loss": 3 / step + 0.1, "cross_entropy": 3 / step, "divergence": 0.1 / step,
        "grad_norm": 1 + 1 / step, "tokens": 100 + 7 * step, "targets": 10 + step, "seconds": 0.5, "flops": 1e9 * step,
    }  # fmt: skip
    return StepRecord(**values | changes)


def opened(folder, *, step=0, state=None, **changes):
    config = MetricsConfig(every=EVERY, **changes)
    return Metrics(folder, config, world=World(), run=RUN, peak=1e12, step=step, state=state)


def advance(metrics, steps):
    """Train and validate: before the first step, and at every fourth."""
    for step in steps:
        metrics.step(record(step))
        if step % 4 == 0:
            metrics.event(step, {"validation_loss": 2 / step, "retention_kl": 0.25})


def whole_run(folder, **changes):
    metrics = opened(folder, **changes)
    metrics.event(0, {"validation_loss": 5.0, "retention_kl": 0.0})
    advance(metrics, range(1, STEPS + 1))
    metrics.close()


def lines(folder, wall=True):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows if wall else [{name: row[name] for name in row if name not in WALL} for row in rows]


def test_a_line_is_the_mean_of_its_window(tmp_path):
    whole_run(tmp_path)
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [0, 3, 4, 6, 8, 8]
    first, records = rows[1], [record(step) for step in (1, 2, 3)]
    targets, tokens = sum(r.targets for r in records), sum(r.tokens for r in records)
    assert first["loss"] == pytest.approx(sum(r.loss * r.targets for r in records) / targets, rel=1e-14)
    assert first["cross_entropy"] == pytest.approx(sum(r.cross_entropy * r.targets for r in records) / targets)
    assert first["divergence"] == pytest.approx(sum(r.divergence * r.tokens for r in records) / tokens)
    assert first["grad_norm"] == pytest.approx(sum(r.grad_norm for r in records) / 3)
    assert (first["tokens"], first["targets"], first["seconds"], first["lr"]) == (tokens, targets, 1.5, 1e-3 / 3)
    assert first["tokens_per_second"] == pytest.approx(tokens / 1.5, abs=0.05)
    assert (first["tflops"], first["mfu"]) == (0.004, 0.004)  # 6e9 FLOPs in 1.5 s, of 1e12 per second
    assert first["memory_gb"] > 0.01
    assert rows[-1]["tokens_seen"] == sum(row.get("tokens", 0) for row in rows)
    assert "skipped" not in first
    assert "alpha" not in first


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 999), st.integers(1, 2000)), min_size=1, max_size=9))
def test_any_window_has_the_exact_mean(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("window")
    metrics = Metrics(folder, MetricsConfig(every=100), world=World(), run=RUN)
    for number, (loss, targets, tokens) in enumerate(steps, start=1):
        metrics.step(record(number, loss=loss, divergence=loss, targets=targets, tokens=tokens))
    metrics.close()
    (row,) = lines(folder)
    if weight := sum(targets for _, targets, _ in steps):
        assert row["loss"] == pytest.approx(math.fsum(loss * n for loss, n, _ in steps) / weight, abs=1e-12)
    else:
        assert row["loss"] is None
    mean = math.fsum(loss * n for loss, _, n in steps) / sum(n for _, _, n in steps)
    assert row["divergence"] == pytest.approx(mean, abs=1e-12)


def test_a_line_of_one_step_is_that_step_bit_by_bit(tmp_path):
    metrics = Metrics(tmp_path, MetricsConfig(), world=World(), run=RUN)
    for step in range(1, 200):
        metrics.step(record(step, divergence=None if step % 2 else 0.1 / step))
    for step, row in enumerate(lines(tmp_path), start=1):
        given_ = vars(record(step, divergence=None if step % 2 else 0.1 / step))
        for name in ("loss", "cross_entropy", "divergence", "grad_norm", "lr", "tokens", "targets"):
            assert row[name] == given_[name]


def test_skipped_steps_count_and_weigh_nothing(tmp_path):
    metrics = opened(tmp_path)
    for step in range(1, 7):
        skipped = step != 2
        metrics.step(record(step, skipped=skipped, **{"loss": math.nan, "grad_norm": math.inf} if skipped else {}))
    one, none = lines(tmp_path)
    assert (one["loss"], one["grad_norm"], one["skipped"]) == (record(2).loss, record(2).grad_norm, 2)
    assert (none["loss"], none["grad_norm"], none["skipped"]) == (None, None, 3)
    assert none["tokens_seen"] == sum(record(step).tokens for step in range(1, 7))


@pytest.mark.parametrize("killed_at", range(1, STEPS + 1))
def test_a_resumed_run_writes_the_lines_of_an_uninterrupted_one(tmp_path, killed_at):
    """Killed 0, 1 and 2 steps after its checkpoint, the last time in the middle of a line."""
    (tmp_path / "whole").mkdir()
    whole_run(tmp_path / "whole")
    for lost in range(3):
        folder = tmp_path / f"lost{lost}"
        folder.mkdir()
        metrics = opened(folder)
        metrics.event(0, {"validation_loss": 5.0, "retention_kl": 0.0})
        advance(metrics, range(1, killed_at + 1))
        state = json.loads(json.dumps(metrics.state()))
        advance(metrics, range(killed_at + 1, min(killed_at + lost, STEPS) + 1))
        metrics.close(finished=lost == 2 and killed_at + lost >= STEPS)
        if lost == 2:
            with (folder / "metrics.jsonl").open("a") as stream:
                stream.write('{"step": 8, "lo')
        metrics = opened(folder, step=killed_at, state=state)
        advance(metrics, range(killed_at + 1, STEPS + 1))
        metrics.close()
        assert lines(folder, wall=False) == lines(tmp_path / "whole", wall=False)


@pytest.mark.parametrize("left", [None, 0, 1, 2])
@pytest.mark.parametrize("killed_at", [3, 5, STEPS])
def test_a_run_that_goes_on_elsewhere_takes_its_lines_along(tmp_path, capsys, killed_at, left):
    """left: lines that an older try has left there."""
    for name in ("whole", "first", "second"):
        (tmp_path / name).mkdir()
    whole_run(tmp_path / "whole")
    metrics = opened(tmp_path / "first")
    metrics.event(0, {"validation_loss": 5.0, "retention_kl": 0.0})
    advance(metrics, range(1, killed_at + 1))
    state = json.loads(json.dumps(metrics.state()))
    if left is not None:
        written = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "second" / "metrics.jsonl").write_text("".join(written[:left]))
    metrics.close()
    metrics = opened(tmp_path / "second", step=killed_at, state=state)
    advance(metrics, range(killed_at + 1, STEPS + 1))
    metrics.close()
    assert lines(tmp_path / "second", wall=False) == lines(tmp_path / "whole", wall=False)
    assert "goes on without" not in capsys.readouterr().err


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path):
    metrics = opened(tmp_path)
    advance(metrics, range(1, STEPS + 1))
    state = metrics.state()
    metrics.close()
    before = lines(tmp_path, wall=False)
    opened(tmp_path, step=STEPS, state=state).close()
    assert lines(tmp_path, wall=False) == before


def test_a_new_run_drops_the_lines_of_one_that_left_no_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\nrubbish\n')
    whole_run(tmp_path)
    assert [row["step"] for row in lines(tmp_path)] == [0, 3, 4, 6, 8, 8]


@pytest.mark.parametrize("damage", ["rubbish", '{"loss": 1.0}', "[1]", '{"step": true}', "", "\0\0\0"])
def test_a_damaged_line_is_refused(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 9.0}}\n{damage}\n{{"step": 3, "loss": 9.0}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged") as refused:
        opened(tmp_path, step=3)
    assert "\n" not in str(refused.value)


def test_a_run_whose_lines_are_lost_says_so_and_goes_on(tmp_path, capsys):
    metrics = opened(tmp_path, step=6)
    advance(metrics, [7, 8])
    metrics.close()
    assert [row["step"] for row in lines(tmp_path)] == [8, 8]
    assert "no lines of the first 6 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("interpolation", "parameter", "value", "weight"),
    [
        ("lerp", "alpha_logit", [math.log(3)], 0.75),
        ("prog", "alpha_logit", [math.log(3)], 0.75),
        ("dlerp", "gate_bias", [math.log(3)], 0.75),
        ("moe", "router_bias", [1.0, 1.0 + math.log(3)], 0.75),
    ],
)
def test_alphas_are_the_resting_weights_of_the_sites(tiny_model, interpolation, parameter, value, weight):
    control = ControlConfig(num_expanded=2, sites=[0, 2], layout="concat", interpolation=interpolation)
    model = expand_model(tiny_model, ControlSettings.resolve(control, num_layers=4))
    control_blocks(model)[1].interpolation.get_parameter(parameter).data.copy_(torch.tensor(value))
    assert alphas(model) == {"0": pytest.approx(0.5), "2": pytest.approx(weight)}


def test_sites_are_named_by_the_base_models_layers(tiny_model):
    control = ControlConfig(num_expanded=2, sites=[1, 3], layout="hybrid")
    model = expand_model(tiny_model, ControlSettings.resolve(control, num_layers=4))
    assert list(alphas(model)) == ["3"]  # the decoder's layer 4, after the stacked copy of 1


def test_a_model_without_weights_has_no_alphas(tiny_model):
    assert alphas(tiny_model) == {}
    control = ControlConfig(num_expanded=2, interpolation="none")
    assert alphas(expand_model(tiny_model, ControlSettings.resolve(control, num_layers=4))) == {}


def test_names_are_grouped():
    row = {"step": 3, "tokens": 5, "loss": 1.0, "divergence": None, "mfu": 0.5, "alpha": {"3": 0.25}, "tokens_seen": 9}
    assert named(row) == {
        "train/tokens": 5, "train/loss": 1, "speed/mfu": 0.5, "train/alpha/3": 0.25, "train/tokens_seen": 9,
    }  # fmt: skip
    row = {"step": 3, "validation_loss": 1.0, "retention_kl": 0.5, "rougeL": 0.25}
    assert named(row) == {"validation/loss": 1, "retention/kl": 0.5, "validation/rougeL": 0.25}


def test_no_password_is_shown():
    assert without_password("cannot reach http://me:secret@host:5000/x") == "cannot reach http://host:5000/x"


def test_a_missing_tracker_is_named_without_torch(tmp_path):
    (tmp_path / "wandb").mkdir()  # what a run of it leaves is not the package
    code = (
        "import importlib.util as util, sys; found = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'mlflow' else found(name)\n"
        "from controlllm.config import MetricsConfig\n"
        "from controlllm.train.trackers import missing_trackers\n"
        "print(missing_trackers(MetricsConfig(trackers=['mlflow']))); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("train.metrics.trackers: mlflow is not installed; pip install 'controlllm[trackers]'")


def test_nothing_is_missing_where_nothing_is_asked_for():
    assert missing_trackers(MetricsConfig()) is None


def installed(tracker):
    return pytest.mark.skipif(
        missing_trackers(MetricsConfig(trackers=[tracker])) is not None,
        reason=f"{tracker} is not installed (extra trackers)",
    )


READERS = {}


def reader(tracker):
    def add(function):
        READERS[tracker] = function
        return function

    return add


@reader("tensorboard")
def of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        (name, event.step): [e.value for e in accumulator.Scalars(name) if e.step == event.step]
        for name in accumulator.Tags()["scalars"]
        for event in accumulator.Scalars(name)
    }


@reader("wandb")
def of_wandb(folder):
    found, numbers = {}, []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for number, items in offline_history(file):
            numbers.append(number)
            for name, value in items.items():
                if "/" in name:
                    found.setdefault((name, items["step"]), []).append(value)
    assert numbers == list(range(len(lines(folder))))
    return found


def settle(folder):
    """W&B's service writes its file after the process that logs was told that it did."""
    files, deadline = folder / "wandb", time.monotonic() + 300
    while files.exists() and time.monotonic() < deadline:
        numbers = {n for file in files.glob("offline-run-*/*.wandb") for n, _ in offline_history(file)}
        if len(numbers) == len(lines(folder)):
            return
        time.sleep(0.05)


@reader("mlflow")
def of_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("controlllm").experiment_id])
    assert run.data.params["train.lr"] == "0.001"
    found = {}
    for name in run.data.metrics:
        for entry in client.get_metric_history(run.info.run_id, name):
            found.setdefault((name, entry.step), []).append(entry.value)
    return found


@pytest.mark.parametrize(
    "tracker", [pytest.param(name, marks=installed(name)) for name in ("tensorboard", "wandb", "mlflow")]
)
def test_curves_go_on_without_gap_or_overlap(tmp_path, monkeypatch, tracker):
    """Stopped after every few steps, each time one or two steps after the checkpoint."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    metrics = opened(tmp_path, trackers=[tracker])
    metrics.event(0, {"validation_loss": 5.0, "retention_kl": 0.0})
    done = 0
    for checkpoint, killed in [(2, 3), (4, 6), (7, 7)]:
        advance(metrics, range(done + 1, checkpoint + 1))
        state = metrics.state()
        advance(metrics, range(checkpoint + 1, killed + 1))
        metrics.close(finished=False)
        settle(tmp_path)
        metrics, done = opened(tmp_path, step=checkpoint, state=state, trackers=[tracker]), checkpoint
    advance(metrics, range(done + 1, STEPS + 1))
    metrics.close()
    settle(tmp_path)
    found = READERS[tracker](tmp_path)
    expected = {(name, row["step"]): value for row in lines(tmp_path) for name, value in named(row).items()}
    assert {place: len(values) for place, values in found.items()} == dict.fromkeys(expected, 1)
    for place, (value,) in found.items():
        if not place[0].startswith("speed/"):
            assert value == pytest.approx(expected[place], rel=1e-6)


@installed("tensorboard")
def test_a_tracker_that_fails_ends_no_run_that_has_begun(tmp_path, capsys):
    blocked = tmp_path / "tensorboard"
    blocked.write_text("a file where its folder should be")
    with pytest.raises(UserError, match="tensorboard cannot be reached: FileExistsError"):
        opened(tmp_path, trackers=["tensorboard"])
    metrics = opened(tmp_path, trackers=["tensorboard"], step=3)
    advance(metrics, [4, 5, 6])
    metrics.state()
    blocked.unlink()
    advance(metrics, [7, 8])
    deadline = time.monotonic() + 300
    while metrics.trackers.senders[0].error and time.monotonic() < deadline:
        time.sleep(0.05)
    metrics.close()
    told = [line for line in capsys.readouterr().err.splitlines() if "tensorboard fails" in line]
    assert len(told) == 1
    assert {step for _, step in of_tensorboard(tmp_path)} == {4, 6, 8}
