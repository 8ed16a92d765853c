"""A run goes on with another number of processes, sharing and micro-batch: the same rows, the same losses (T4)."""

import numpy as np
import pytest
from killed_runs import Kill, inputs_of, lines, pack, rows_of_steps, train, trained, with_train

pytestmark = pytest.mark.distributed
SHARD, REPLICAS = {"parallel": {"kind": "fsdp"}}, {"parallel": {"kind": "fsdp", "replicas": 2}}
SAVING = {"every": 2, "asynchronous": False}
FROZEN = {"parallel": {"kind": "fsdp", "frozen": "replicate"}}
ALONE: dict = {"parallel": {"kind": "ddp"}}
SIZES = [(1, ALONE), (2, ALONE), (4, ALONE), (3, ALONE), (1, ALONE)]
STRATEGIES = [(2, ALONE), (2, SHARD), (4, REPLICAS), (1, ALONE), (3, FROZEN)]


@pytest.fixture(scope="module")
def shards(tiny_base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLLLM_CACHE", str(tmp_path_factory.mktemp("store")))
        yield pack(tiny_base)


def goes_on(inputs, folder, ways):
    """Kill it after every second step, and go on in another way; the rows and losses of the run that one process makes.

    ways: number of processes and settings of `train`, for two steps each.
    """
    train(inputs, folder / "whole")
    want, order = lines(folder / "whole"), rows_of_steps(folder / "whole")
    seen = {}
    for number, (size, changes) in enumerate(ways):
        last = number == len(ways) - 1
        until = 2 * number + 3
        kill = None if last else Kill("forward", until)
        for file in (folder / "moved").glob("rows-*.jsonl"):
            file.unlink()
        train(with_train(inputs, **changes), folder / "moved", size=size, kill=kill)
        made = rows_of_steps(folder / "moved")
        assert min(made) == 2 * number + 1, "nothing is lost, and nothing repeated"
        seen |= {step: rows for step, rows in made.items() if last or step < until}
    assert seen == order
    found = lines(folder / "moved")
    for key in ("step", "tokens", "targets", "tokens_seen", "lr"):
        assert [row[key] for row in found] == [row[key] for row in want]
    for key in ("loss", "cross_entropy", "divergence"):
        np.testing.assert_allclose([r[key] for r in found], [r[key] for r in want], atol=1e-6, rtol=0)
    np.testing.assert_allclose([r["grad_norm"] for r in found], [r["grad_norm"] for r in want], rtol=1e-5)
    for name, tensor in trained(folder / "whole").items():
        np.testing.assert_allclose(trained(folder / "moved")[name], tensor, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("ways", [SIZES, STRATEGIES], ids=["sizes", "strategies"])
def test_goes_on_another_way(tiny_base, shards, tmp_path, ways):
    goes_on(inputs_of(tiny_base, shards, checkpoint=SAVING), tmp_path, ways)


def test_goes_on_with_another_micro_batch(tiny_base, shards, tmp_path):
    ways = [(1, {}), (2, {"micro_batch_size": 2}), (1, {"micro_batch_size": 4}), (2, SHARD | {"micro_batch_size": 2})]
    goes_on(inputs_of(tiny_base, shards, steps=8, checkpoint=SAVING), tmp_path, ways)
