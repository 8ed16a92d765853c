"""The retention probe: the benchmark's loss, and the distance from the base."""

import copy
import json
import math

import pytest
import torch
from held_back import documents, log_probabilities, perturb, trained, validation

from controlllm.config import RetentionConfig, ValidationConfig
from controlllm.control.loss import forward_with_loss
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.data.catalog import user
from controlllm.data.loader import collate
from controlllm.errors import UserError
from controlllm.train.retention import divergence, retention_rows

ITEMS = {
    "prose": [{"id": i, "text": f"passage number {i}"} for i in range(5)],
    "code": [{"id": 0, "prompt": "def f():\n    ", "target": "return 1\n"}],
    "mmlu": [{"id": 0, "prompt": "Question: x\nAnswer:", "choices": ["one", "two"], "answer": 1}],
    "chat": [{"id": 0, "messages": [user("hi")], "prompt": "<|im_start|>hi", "target": "hello", "eos": "<|im_end|>"}],
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    (tmp_path / "probes").mkdir()
    for name, items in ITEMS.items():
        (tmp_path / "probes" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path


def scored(rows, tokenizer):
    """(before, target) of every document, as text."""
    return sorted((tokenizer.decode(ids[~t]), tokenizer.decode(ids[t])) for row in rows for ids, t in documents(row))


def test_what_of_a_probe_is_scored(data, tokenizer):
    found = retention_rows(data, RetentionConfig(probes=list(ITEMS), items=3), tokenizer, 64)
    assert scored(found, tokenizer) == sorted([
        ("<|im_end|>", "passage number 0"), ("<|im_end|>", "passage number 1"), ("<|im_end|>", "passage number 3"),
        ("def f():", "\n    return 1\n"), ("Question: x\nAnswer:", " two"), ("<|im_start|>hi", "hello<|im_end|>"),
    ])  # fmt: skip
    assert max(len(row["input_ids"]) for row in found) <= 64
    short = retention_rows(data, RetentionConfig(probes=["prose", "mmlu"], items=1), tokenizer, 8)
    assert scored(short, tokenizer) == [("<|im_end|>", "passage"), ("wer:", " two")]
    with pytest.raises(UserError, match=r"'nothing' is not measured in this run; add it to benchmark\.old"):
        retention_rows(data, RetentionConfig(probes=["nothing"]), tokenizer, 64)


def test_retention_loss_is_the_benchmarks(data, tokenizer, tiny_model):
    from lm_eval.api.instance import Instance

    from controlllm.benchmark.harness import TokenLM
    from controlllm.benchmark.hf_engine import HFEngine

    model = copy.deepcopy(tiny_model)
    lm = TokenLM(HFEngine(model, tokenizer, 4), tokenizer, model.config, lambda done, note="": None)
    ask = lambda kind, *texts: Instance(kind, {}, texts, 0)  # noqa: E731
    code, chat, mmlu = (ITEMS[name][0] for name in ("code", "chat", "mmlu"))
    pairs = [(code["prompt"], code["target"]), (chat["prompt"], "hello<|im_end|>"), (mmlu["prompt"], " two")]
    chances = [chance for chance, _ in lm.loglikelihood([ask("loglikelihood", *pair) for pair in pairs])]
    texts = [item["text"] for item in ITEMS["prose"]]
    chances += lm.loglikelihood_rolling([ask("loglikelihood_rolling", text) for text in texts])
    tokens = sum(lm.count_after(*pair) for pair in pairs) + sum(map(lm.count, texts))
    config = RetentionConfig(probes=list(ITEMS))
    found = retention_rows(data, config, tokenizer, 64)
    metrics = validation(trained(tiny_model), ValidationConfig(retention=config), retention=found).run()
    assert metrics == {"retention_loss": pytest.approx(-sum(chances) / tokens, abs=1e-5), "retention_kl": 0}


@pytest.mark.parametrize("settings", [
    None, {}, {"layout": "stack"}, {"layout": "hybrid"}, {"interpolation": "dlerp"}, {"interpolation": "slerp"},
])  # fmt: skip
@pytest.mark.parametrize("positions", [7, 1000])
def test_distance_from_the_base(data, tokenizer, tiny_model, settings, positions):
    base = copy.deepcopy(tiny_model)
    expanded = tiny_model if settings is None else expand_model(tiny_model, ControlSettings(sites=[1, 3], **settings))
    model = trained(expanded)
    probes = RetentionConfig(probes=["prose", "chat"], positions=positions)
    config, found = ValidationConfig(retention=probes), retention_rows(data, probes, tokenizer, 64)
    if settings is None:
        probe = validation(model, config, retention=found)
        assert probe.run()["retention_kl"] == 0
        perturb(model)
    else:
        assert validation(model, config, retention=found).run()["retention_kl"] == 0
        perturb(model)
        probe = validation(model, config, retention=found)  # the base is within it, however far it has been trained
    parts = [zip(log_probabilities(base, row), log_probabilities(model, row), strict=True) for row in found]
    each = torch.cat([(b.exp() * (b - m)).sum(-1) for part in parts for (b, _), (m, _) in part])
    taken = min(positions, len(each))
    want = each[[i * len(each) // taken for i in range(taken)]].mean().item()
    assert probe.run()["retention_kl"] == pytest.approx(want, rel=1e-3)
    assert want > 1e-3


def test_what_the_base_rules_out_adds_nothing():
    half = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert divergence(half, torch.tensor([[0.25, 0.25, 0.5]]).log()) == pytest.approx(math.log(2))
    assert divergence(half, half) == 0
    assert divergence(half, torch.tensor([[0.5, 0.0, 0.5]]).log()) == math.inf


def test_looking_at_the_base_does_not_move_training(data, tokenizer, tiny_model):
    model = trained(expand_model(tiny_model, ControlSettings(sites=[1, 3])))
    perturb(model)
    config = RetentionConfig(probes=["prose"])
    found = retention_rows(data, config, tokenizer, 64)

    def loss():
        return forward_with_loss(model, **collate(found[:1]).arguments()).loss.item()

    before = loss()
    validation(model, ValidationConfig(retention=config), retention=found).run()
    assert loss() == before
