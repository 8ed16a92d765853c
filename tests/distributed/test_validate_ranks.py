"""One rank = four ranks to the last digit, for every number of rows, however the model is shared."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
from ranks import run

from controlllm.config import DDP, FSDP, GenerateConfig, RetentionConfig, TrainConfig, ValidationConfig

pytestmark = pytest.mark.distributed
SIZES = range(1, 34)
WAYS = {
    "ddp": DDP(),
    "fsdp": FSDP(),
    "frozen weights everywhere": FSDP(frozen="replicate"),
}  # fmt: skip


def made_up_rows(count):
    """Rows of one to three conversations: a question, then an answer that is learned."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(count):
        pairs = draw.integers([3, 2], [20, 9], (1 + number % 3, 2)).tolist()
        target = np.concatenate([np.repeat([False, True], pair) for pair in pairs])
        ids = draw.integers(2, 258, len(target)).astype(np.uint32)
        ids[np.cumsum([sum(pair) for pair in pairs]) - 1] = 1  # the end of a turn
        lengths = np.array([sum(pair) for pair in pairs])
        rows.append({"input_ids": ids, "target": target, "lengths": lengths, "rows": np.arange(len(pairs))})
    return rows


def spread(model, world, way):
    from controlllm.train.parallel import parallelize

    return parallelize(model, world, TrainConfig(precision="float32", parallel=WAYS[way]))


def tiny_control():
    """One site, trained a little: away from its base."""
    import torch
    from conftest import tiny_config
    from transformers import LlamaForCausalLM

    from controlllm.control.model import expand_model
    from controlllm.control.settings import ControlSettings
    from controlllm.train import attention

    torch.manual_seed(0)
    attention.register()
    config = tiny_config(num_hidden_layers=2, hidden_size=32, intermediate_size=48, initializer_range=0.3)
    model = expand_model(LlamaForCausalLM(config), ControlSettings(sites=[1]))
    model.config.use_cache = False
    model.config._attn_implementation = "packed"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model.train()


def losses(world, way):
    """Of the first rows of every number, in this process; and whether the model still trains."""
    from controlllm.train.validate import Validation

    model = tiny_control()
    forward, rows = spread(model, world, way), made_up_rows(SIZES[-1])
    found = []
    for size in SIZES:
        made = Validation(
            forward, model, ValidationConfig(), rows=rows[:size], world=world, autocast=nullcontext, micro_batch_size=3
        )
        found.append(made.run()["validation_loss"])
    return found, gradients(forward, model, rows)


def gradients(forward, model, rows):
    from controlllm.data.loader import collate

    forward(**collate(rows[:2]).arguments(), num_items_in_batch=1).loss.backward()
    return any(p.grad is not None for p in model.parameters() if p.requires_grad)


def everything(world, way, tokenizer):
    """All metrics and the texts of a validation with questions and old skills, at the start and after a change."""
    import torch

    from controlllm.train.validate import Validation

    model = tiny_control()
    forward, rows = spread(model, world, way), made_up_rows(7)
    config = ValidationConfig(
        generate=GenerateConfig(items=9, max_new_tokens=6, batch_size=2), retention=RetentionConfig()
    )
    made = Validation(
        forward, model, config, rows=rows[:5], world=world, autocast=nullcontext, micro_batch_size=2,
        tokenizer=tokenizer, retention=made_up_rows(7),
    )  # fmt: skip
    first = made.run(), made.samples()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    return first, (made.run(), copy.deepcopy(made.samples())), gradients(forward, model, rows)


def both(world, ways, tokenizer):
    return {way: (losses(world, way), everything(world, way, tokenizer)) for way in ways}


@pytest.fixture(scope="module")
def alone(tokenizer):
    [found] = run(both, 1, ["ddp"], tokenizer)
    return found["ddp"]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_change_no_digit(alone, tokenizer, size):
    (one_loss, trains), ((metrics, samples), (later, _), _) = alone
    assert trains
    assert len(set(one_loss)) == len(SIZES)
    assert len({sample["answer"] for sample in samples}) > 3
    assert metrics["generated_items"] == 9
    assert later["retention_kl"] > metrics["retention_kl"] > 0
    for rank, found in enumerate(run(both, size, list(WAYS), tokenizer)):
        for way in WAYS:
            assert found[way] == alone, (rank, way)
