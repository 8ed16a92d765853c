"""Validation while training: its loss against a naive one, and the best of a run."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from held_back import log_probabilities, perturb, three_rows, trained, validation
from hypothesis import given
from hypothesis import strategies as st

from controlllm import progress
from controlllm.config import BestConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.train import passes
from controlllm.train.best import Best


@pytest.fixture
def rows(tokenizer):
    return three_rows(tokenizer)


def test_loss_is_that_of_every_document_by_itself(rows, tiny_model):
    model = trained(expand_model(tiny_model, ControlSettings(sites=[1, 3])))
    perturb(model)
    found = validation(model, rows=rows).run()
    parts = [
        F.nll_loss(chances, ids, reduction="none") for row in rows for chances, ids in log_probabilities(model, row)
    ]
    want = torch.cat(parts).mean().item()
    assert found == {
        "validation_loss": pytest.approx(want, abs=1e-5),
        "validation_perplexity": math.exp(found["validation_loss"]),
    }
    assert model.training
    assert all(module.training for module in model.modules())


def test_nothing_to_look_at_is_said_in_one_line(rows, tiny_model):
    with pytest.raises(UserError, match=r"^validation: no rows are held back; raise pack\.validation_fraction"):
        validation(trained(tiny_model))
    silent = [row | {"target": np.zeros_like(row["target"])} for row in rows]
    with pytest.raises(UserError, match="no token to predict"):
        validation(trained(tiny_model), rows=silent)


def test_a_long_validation_shows_itself(rows, tiny_model, monkeypatch, capsys):
    beats = []
    made = validation(trained(tiny_model), rows=rows, micro_batch_size=1, beat=lambda: beats.append(1))
    made.run()
    assert capsys.readouterr().err == ""
    assert len(beats) == 3
    monkeypatch.setattr(passes, "QUIET_SECONDS", 0)
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0)
    made.run()
    assert "validate: 2/3" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_told(rows, tiny_model):
    model = trained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    metrics = validation(model, rows=rows).run()
    assert math.isnan(metrics["validation_loss"])
    assert math.isnan(metrics["validation_perplexity"])


@given(
    st.lists(st.floats(-5, 5) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=12),
    st.sampled_from(["min", "max"]),
    st.sampled_from([0.0, 0.5]),
    st.integers(1, 4) | st.none(),
)
def test_best_is_the_best_by_hand(values, goal, min_delta, patience):
    config = BestConfig(metric="x", goal=goal, min_delta=min_delta, patience=patience)
    best = Best(config)
    kept, at, gains = None, None, []
    for step, value in enumerate(values):
        gain = math.isfinite(value) and (
            kept is None or (kept - value > min_delta if goal == "min" else value - kept > min_delta)
        )
        if gain:
            kept, at = value, step
        gains.append(gain)
        assert best.update(step, {"x": value}) is gain
        again = Best(config)
        again.load(json.loads(json.dumps(best.state())))
        best = again
        assert (best.value, best.step) == (kept, at)
        assert best.exhausted is (patience is not None and len(gains) >= patience and not any(gains[-patience:]))


def test_best_of_nothing_measured():
    with pytest.raises(UserError, match=r"validation\.best\.metric: 'bleu' is not measured; this run has a, b$"):
        Best(BestConfig(metric="bleu")).update(1, {"b": 1.0, "a": 2.0})
