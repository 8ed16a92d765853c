"""Training: resumed = uninterrupted, accumulated = at once, damaged checkpoints are passed over."""

import json

import numpy as np
import pytest
import torch
from packed_rows import Rows, mix_of

from controlllm.config import Method, ModelConfig, TrainConfig
from controlllm.control.interpolation import STRATEGIES
from controlllm.errors import RunError, UserError
from controlllm.train.checkpoint import Checkpoints, load_trained, trained_tensors
from controlllm.train.curves import RunFacts
from controlllm.train.distributed import World
from controlllm.train.model import load_model
from controlllm.train.native import Trainer
from controlllm.train.parallel import parallelize

STEPS = 6
WALL = {"seconds", "data_seconds", "tokens_per_second", "tflops", "mfu", "memory_gb"}


def rows():
    rng = np.random.default_rng(0)
    made = []
    for _ in range(10):
        lengths = rng.integers(3, 20, size=3)
        ids = rng.integers(2, 258, size=lengths.sum())
        made.append({"input_ids": ids, "target": rng.random(len(ids)) < 0.6, "lengths": lengths})
    return Rows(made)


def trainer(base, folder, *, control=True, method=None, dtype="float32", **changes):
    settings = {"steps": STEPS, "lr": 1e-2, "global_batch_size": 4, "precision": "float32", "checkpoint": {"every": 2}}
    config = TrainConfig.model_validate(settings | changes)
    torch.manual_seed(0)
    chosen = {"control": {"num_expanded": 2} | (method or {})} if control else {}
    model = load_model(base, ModelConfig(name=str(base), dtype=dtype), Method.model_validate(chosen))
    folder.mkdir(exist_ok=True)
    saved = Checkpoints(folder / "checkpoints", config.checkpoint, world=World(), identity={})
    run = RunFacts(name="tiny", key="tiny", settings={})
    return Trainer(
        parallelize(model, World(), config), mix_of(rows()), config, folder=folder, checkpoints=saved, run=run
    )


def weights(trainer):
    return {k: v.clone() for k, v in trained_tensors(trainer.model).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("control", [True, False])
def test_it_learns(tiny_base, tmp_path, control):
    run = trainer(tiny_base, tmp_path, control=control, steps=30, global_batch_size=10)
    losses = [_step(run).cross_entropy for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("interpolation", STRATEGIES)
def test_every_interpolation_learns_with_frozen_weights_in_half(tiny_base, tmp_path, interpolation):
    method = {"interpolation": interpolation, "divergence": "cosine", "norm_relaxation": "learned", "alpha": 0.6}
    run = trainer(
        tiny_base, tmp_path, method=method, dtype="bfloat16", precision="bf16", steps=20, global_batch_size=10
    )
    losses = [_step(run).loss for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]


def _step(run):
    return run.train_step()[0]


@pytest.mark.parametrize("killed_after", [1, 2, 3, 4, 5])
def test_resumed_is_uninterrupted(tiny_base, tmp_path, killed_after):
    whole = trainer(tiny_base, tmp_path / "whole", micro_batch_size=2)
    whole.train()

    class Killed(Exception):
        pass

    part = trainer(tiny_base, tmp_path / "part", micro_batch_size=2)
    ordinary = part.train_step

    def step():
        if part.step == killed_after:
            raise Killed
        return ordinary()

    part.train_step = step
    with pytest.raises(Killed):
        part.train()
    again = trainer(tiny_base, tmp_path / "part", micro_batch_size=2)
    again.train()
    assert equal(weights(again), weights(whole))
    assert _log(tmp_path / "part") == _log(tmp_path / "whole")


def _log(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in WALL} for row in rows]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulated_is_at_once(tiny_base, tmp_path, micro_batch_size):
    at_once, split = (trainer(tiny_base, tmp_path, micro_batch_size=n) for n in (4, micro_batch_size))
    a, b = _step(at_once), _step(split)
    assert (a.tokens, a.targets) == (b.tokens, b.targets)
    assert b.loss == pytest.approx(a.loss, abs=1e-6)
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)


def test_checkpointed_activations_change_nothing(tiny_base, tmp_path):
    plain, saving = (trainer(tiny_base, tmp_path, activation_checkpointing=on) for on in ("none", "full"))
    a, b = _step(plain), _step(saving)
    assert b.loss == pytest.approx(a.loss, abs=1e-7)
    assert b.divergence == pytest.approx(a.divergence, abs=1e-7)
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-6)


def test_frozen_tensors_stay(tiny_base, tmp_path):
    run = trainer(tiny_base, tmp_path)
    frozen = {n: p.clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    assert frozen
    assert all(torch.equal(p, frozen[n]) for n, p in run.model.named_parameters() if n in frozen)


def test_tensors_of_another_run_are_refused(tiny_base, tmp_path):
    from safetensors.torch import save_file

    run = trainer(tiny_base, tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is of another run"):
        load_trained(tmp_path / "x.safetensors", run.model)


def test_a_step_that_is_not_finite_is_not_applied(tiny_base, tmp_path):
    run = trainer(tiny_base, tmp_path)
    with torch.no_grad():
        next(p for p in run.trained if p.ndim == 2)[0, 0] = float("nan")
    before = weights(run)
    applied = [not run.train_step()[0].skipped for _ in range(3)]
    with pytest.raises(RunError, match=r"not finite.*a\.jsonl:"):
        run.train_step()
    assert not any(applied)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before.values(), weights(run).values(), strict=True)
    )
