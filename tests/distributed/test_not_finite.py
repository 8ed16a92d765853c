"""One rank's loss or gradient is no number: no rank takes the step, and the rows are named (T8)."""

from pathlib import Path

import pytest
import torch
from killed_runs import inputs_of, lines, pack
from ranks import run

from controlllm.control.expand import control_blocks
from controlllm.errors import UserError
from controlllm.train.checkpoint_tensors import named_tensors
from controlllm.train.fit import fit
from controlllm.train.run import TrainingRun
from controlllm.train.staging import local_part

pytestmark = pytest.mark.distributed
SHARD = {"parallel": {"kind": "fsdp"}}
SECOND = {"trainer": "transformers"}


@pytest.fixture(scope="module")
def shards(tiny_base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLLLM_CACHE", str(tmp_path_factory.mktemp("store")))
        yield pack(tiny_base)


def poisoned(world, inputs, folder, what, steps):
    """A run in which rank 1 meets NaN or inf in these steps: which steps changed anything of it, and its error."""
    torch.set_num_threads(1)
    path, changed, before, hooks, runs = Path(folder), {}, {}, [], []
    begin, end = TrainingRun._begin_step, TrainingRun._end_step

    def begun(self):
        number = self.step + 1
        before[number] = contents(self)
        runs.append(self)
        if number in steps and world.rank == 1 and what != "weight":
            hooks.append(control_blocks(self.model)[0].expanded.register_forward_hook(POISON[what]))
        return begin(self)

    def ended(self, *arguments, **named):
        number = self.step + 1
        changed[number] = contents(self) != before[number]
        while hooks:
            hooks.pop().remove()
        if number in steps and what == "weight":
            trained = [p for p in self.model.parameters() if p.requires_grad]
            local_part(trained[-1].data).view(-1)[:1] = torch.nan
        return end(self, *arguments, **named)

    TrainingRun._begin_step, TrainingRun._end_step = begun, ended
    path.mkdir(exist_ok=True)
    try:
        fit(inputs, world, path, "key", {"run": 1})
    except UserError as error:
        for number in before.keys() - changed.keys():  # in which it ended
            changed[number] = contents(runs[-1]) != before[number]
        return changed, str(error)
    return changed, None


def contents(trainer):
    named = named_tensors(trainer.model, trainer.optimizer)
    return {name: local_part(tensor).numpy().tobytes() for name, tensor in named.items()}


def in_loss(module, arguments, output):
    return (output[0] * torch.nan, *output[1:]) if isinstance(output, tuple) else output * torch.nan


def in_gradient(module, arguments, output):
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient + torch.inf)


POISON = {"loss": in_loss, "gradient": in_gradient}


@pytest.mark.parametrize("way", [{}, SHARD, SECOND, SECOND | SHARD], ids=["ddp", "fsdp", "hf-ddp", "hf-fsdp"])
@pytest.mark.parametrize("what", POISON)
def test_no_rank_takes_the_step(tiny_base, shards, tmp_path, capfd, way, what):
    inputs = inputs_of(tiny_base, shards, steps=6, guards={"max_skipped": 1}, **way)
    for changed, error in run(poisoned, 2, inputs, str(tmp_path), what, {2, 4}):
        assert error is None
        assert changed == {1: True, 2: False, 3: True, 4: False, 5: True, 6: True}
    assert [row.get("skipped") for row in lines(tmp_path)] == [None, 1, None, 1, None, None]


@pytest.mark.parametrize("way", [{}, SHARD, SECOND, SECOND | SHARD], ids=["ddp", "fsdp", "hf-ddp", "hf-fsdp"])
@pytest.mark.parametrize("what", POISON)
def test_too_many_in_a_row_end_the_run(tiny_base, shards, tmp_path, way, what):
    inputs = inputs_of(tiny_base, shards, guards={"max_skipped": 1}, **way)
    answers = run(poisoned, 2, inputs, str(tmp_path), what, {3, 4})
    errors = {error for _, error in answers}
    assert len(errors) == 1, "one line, the same on all"
    line = errors.pop()
    assert line.startswith("step 4: ")
    assert "is not finite" in line or "are not finite" in line
    assert "the second such step in a row (train.guards.max_skipped 1)" in line
    assert "puzzles:" in line
    if what == "loss":
        assert "rows: rank 1, micro-batch 0: puzzles:" in line
    assert all(changed == {1: True, 2: True, 3: False, 4: False} for changed, _ in answers)


@pytest.mark.parametrize("way", [{}, SHARD], ids=["ddp", "fsdp"])
def test_weights_that_are_no_numbers_are_never_published(tiny_base, shards, tmp_path, way):
    inputs = inputs_of(tiny_base, shards, checkpoint={"every": 1}, **way)
    answers = run(poisoned, 2, inputs, str(tmp_path), "weight", {3})
    assert len({error for _, error in answers}) == 1
    assert "not finite, so no checkpoint is written" in answers[0][1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
