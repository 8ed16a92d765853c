"""A run that was killed at any point and started again is, to the bit, the run that was not (T2)."""

import pytest
from killed_runs import WATCHED, Kill, inputs_of, killed_and_gone_on, lines, pack, train, trained

pytestmark = pytest.mark.distributed
FILES = "controlllm.train.checkpoint_files"
BEFORE_AND_IN_STEPS = [
    Kill("validate", 1),  # of the untrained model
    Kill("data", 1),
    Kill("forward", 2, call=3),  # in the middle of the accumulation, and of the warm-up
    Kill("optimizer", 2),
    Kill("save", 3),
    Kill("backward", 3, call=2),
    Kill("gradients", 4),
    Kill("validate", 5),
    Kill("forward", 6, call=4),  # the rows come for the second time
    Kill("save", 7),
    Kill("data", 8),
    Kill("optimizer", 9),
    Kill("optimizer", 10),
    Kill("validate", 11),
    Kill("save", 11),
    Kill("restore", 11),  # of the best, after the last step
]
IN_SAVES = [
    Kill(f"{FILES}.LocalStore.begin", after=True),
    Kill(f"{FILES}.LocalStore.deliver"),
    Kill(f"{FILES}.sync", call=2),  # the manifest is written
    Kill(f"{FILES}.sync", call=3, after=True),  # before it is renamed
    Kill(f"{FILES}.sync", call=4),  # after that: it counts
    Kill(f"{FILES}.LocalStore.remove"),
    Kill(f"{FILES}._delete", call=2),  # what is removed is out of sight, and still there
    Kill(f"{FILES}.LocalStore.publish"),
    Kill("controlllm.train.fit.whole_trained_tensors"),
    Kill("controlllm.train.fit.save_file", after=True),
    Kill("controlllm.train.fit._summary"),
    Kill("shutil.rmtree"),
    Kill("shutil.rmtree", after=True),
]


@pytest.fixture(scope="module")
def shards(tiny_base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLLLM_CACHE", str(tmp_path_factory.mktemp("store")))
        yield pack(tiny_base)


@pytest.mark.parametrize(
    ("kills", "changes"),
    [(BEFORE_AND_IN_STEPS, {}), (IN_SAVES, {"checkpoint": {"every": 2, "keep": 1, "asynchronous": False}})],
    ids=["steps", "saves"],
)
def test_killed_everywhere(tiny_base, shards, tmp_path, kills, changes):
    inputs = inputs_of(tiny_base, shards, watched=WATCHED, **changes)
    train(inputs, tmp_path / "whole")
    killed_and_gone_on(inputs, tmp_path / "killed", tmp_path / "whole", kills)
