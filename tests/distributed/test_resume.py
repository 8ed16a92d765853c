"""A run that was killed at any point and started again is, to the bit, the run that was not (T2)."""

import pytest
from conftest import tiny_config
from killed_runs import (
    METHODS,
    WATCHED,
    Kill,
    inputs_of,
    killed_and_gone_on,
    lines,
    pack,
    rows_of_steps,
    same_to_the_bit,
    train,
    trained,
)  # fmt: skip
from transformers import LlamaForCausalLM

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
    [
        (BEFORE_AND_IN_STEPS, {}),
        (IN_SAVES, {"checkpoint": {"every": 2, "keep": 1, "asynchronous": False}}),
        (BEFORE_AND_IN_STEPS[::2], {"trainer": "transformers"}),
    ],
    ids=["steps", "saves", "transformers"],
)
def test_killed_everywhere(tiny_base, shards, tmp_path, kills, changes):
    inputs = inputs_of(tiny_base, shards, watched=WATCHED, **changes)
    train(inputs, tmp_path / "whole")
    killed_and_gone_on(inputs, tmp_path / "killed", tmp_path / "whole", kills)


KILLS = [Kill("backward", 4, call=2), Kill("save", 7)]
SECOND = {"trainer": "transformers"}
WAYS = {
    "alone": (1, {}),
    "ddp": (2, {}),
    "fsdp": (2, {"parallel": {"kind": "fsdp"}}),
    "transformers-ddp": (2, SECOND),
    "transformers-fsdp": (2, SECOND | {"parallel": {"kind": "fsdp"}}),
}
PRECISIONS = ("float32", "bf16", "bf16_stochastic", "bf16_kahan", "fp16")


def resumes(base, shards, folder, *, size=1, kills=KILLS, **settings):
    inputs = inputs_of(base, shards, **settings)
    train(inputs, folder / "whole", size=size)
    killed_and_gone_on(inputs, folder / "killed", folder / "whole", kills, size=size)
    return folder / "whole"


@pytest.mark.parametrize(
    ("method", "precision", "way"),
    [
        ("hybrid", "fp16", "alone"),
        ("lora", "bf16", "alone"),
        ("partial", "bf16_stochastic", "alone"),
        ("full", "bf16_kahan", "alone"),
        ("control", "bf16", "ddp"),
        ("control", "float32", "fsdp"),
        ("ia3", "bf16", "alone"),
        ("dora twins", "bf16", "fsdp"),
        ("control", "float32", "transformers-ddp"),
        ("lora", "fp16", "transformers-fsdp"),
    ],
)
def test_every_way_of_training_goes_on(tiny_base, shards, tmp_path, method, precision, way):
    size, changes = WAYS[way]
    resumes(tiny_base, shards, tmp_path, method=method, precision=precision, size=size, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_all_of_them_go_on(tiny_base, shards, tmp_path, method, precision, way):
    size, changes = WAYS[way]
    resumes(tiny_base, shards, tmp_path, method=method, precision=precision, size=size, **changes)


def test_goes_on_on_another_machine(tiny_base, shards, tmp_path):
    """Of the first machine nothing is left but what it wrote under the profile's root of checkpoints."""
    inputs = inputs_of(tiny_base, shards, watched=WATCHED)
    train(inputs, tmp_path / "whole")
    root = tmp_path / "root"
    train(inputs, tmp_path / "first", kill=Kill("forward", 8), root=root)
    train(inputs, tmp_path / "second", root=root)
    assert min(rows_of_steps(tmp_path / "second")) > 4
    assert lines(tmp_path / "second") == lines(tmp_path / "whole")
    same_to_the_bit(trained(tmp_path / "second"), trained(tmp_path / "whole"))
    assert len(list(root.iterdir())) == 1


@pytest.mark.parametrize("way", ["alone", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_state_in_8_bits_goes_on(tmp_path_factory, tokenizer, shards, tmp_path, way):
    base = tmp_path_factory.mktemp("wide")  # so that there is something to keep in 8 bits
    LlamaForCausalLM(tiny_config(hidden_size=256, num_hidden_layers=2)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    size, changes = WAYS[way]
    optimizer = {"name": "adamw_8bit", "weight_decay": 0.1}
    resumes(base, shards, tmp_path, method="full", size=size, steps=6, kills=KILLS[:1], optimizer=optimizer, **changes)


def test_a_run_measured_in_tokens_goes_on(tiny_base, shards, tmp_path):
    changes = {"steps": None, "tokens": 9000, "schedule": {"warmup_tokens": 2000, "kind": "wsd"}}
    whole = resumes(tiny_base, shards, tmp_path, **changes)
    assert lines(whole)[-1]["tokens_seen"] >= 9000 > lines(whole)[-2]["tokens_seen"]


def test_a_run_that_stops_early_stays_stopped(tiny_base, shards, tmp_path):
    watched = {"every": 2, "rows": 2, "best": {"patience": 2}}
    whole = resumes(tiny_base, shards, tmp_path, watched=watched, kills=[Kill("backward", 5), Kill("restore", 7)])
    assert lines(whole)[-1]["step"] == 6


def test_a_finished_run_trains_no_step(tiny_base, shards, tmp_path):
    inputs = inputs_of(tiny_base, shards, steps=4)
    train(inputs, tmp_path, kill=Kill("controlllm.train.fit._write_whole"))
    for _ in range(2):  # from the last checkpoint, and from what is finished
        for file in tmp_path.glob("rows-*.jsonl"):
            file.unlink()
        train(inputs, tmp_path)
        assert not rows_of_steps(tmp_path)
    assert len(trained(tmp_path))
