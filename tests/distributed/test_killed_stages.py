"""SIGKILL at random instants of the last steps of a run and of `consolidate`: the same command makes it whole (T1)."""

import os
import random
import shutil
import time
from functools import partial
from multiprocessing import get_context

import pytest
import torch
import torch.distributed.checkpoint.state_dict_saver as torch_dcp
from killed_runs import Kill, inputs_of, pack, same_to_the_bit, train, trained
from ranks import PRELOADED
from transformers import AutoModelForCausalLM

from controlllm.consolidate import consolidate
from controlllm.consolidate.foreign import export
from controlllm.store import LINEAGE
from controlllm.train.distributed import World
from controlllm.train.fit import fit
from controlllm.train.stage import train as train_stage

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("store")
        patch.setenv("CONTROLLLM_CACHE", str(folder))
        yield folder


def work(begun, done, cache, function):
    os.environ["CONTROLLLM_CACHE"] = str(cache)
    torch.set_num_threads(1)
    begun.set()
    function()
    done.set()


def killed_at_random(cache, function, *, rng, check, kills):
    """Kill `function` in a process of its own again and again, and look after each time; how often it was at work."""
    context, hits, longest = get_context("forkserver"), 0, 0.2
    context.set_forkserver_preload(PRELOADED)
    for _ in range(kills):
        begun, done = context.Event(), context.Event()
        process = context.Process(target=work, args=(begun, done, cache, function))
        process.start()
        assert begun.wait(600)
        start = time.monotonic()
        process.join(rng.uniform(0, longest))
        if process.is_alive():
            longest *= 1.15  # until some come to the end
        process.kill()
        process.join()
        hits += not done.is_set()
        longest = min(longest, 1.2 * (time.monotonic() - start)) if done.is_set() else longest
        check()
    return hits


def last_steps(inputs, folder):
    fit(inputs, World(), folder, "key", {"run": 1})


def test_the_end_of_a_run(tiny_base, cache, tmp_path):
    inputs = inputs_of(tiny_base, pack(tiny_base), steps=4)
    train(inputs, tmp_path / "whole")
    killed = tmp_path / "killed"
    train(inputs, killed, kill=Kill("controlllm.train.fit.whole_trained_tensors"))
    shutil.copytree(killed, tmp_path / "trained")

    def check():
        """What is finished is whole; then back to where all is trained and nothing finished."""
        if (killed / "train.json").exists():
            same_to_the_bit(trained(killed), trained(tmp_path / "whole"))
        if not (killed / "checkpoints").exists():
            shutil.rmtree(killed)
            shutil.copytree(tmp_path / "trained", killed)

    hits = killed_at_random(cache, partial(last_steps, inputs, killed), rng=random.Random(1), check=check, kills=15)
    assert hits >= 5
    train(inputs, killed)
    same_to_the_bit(trained(killed), trained(tmp_path / "whole"))


def weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_consolidate(tiny_base, cache):
    inputs = inputs_of(tiny_base, pack(tiny_base), steps=4)
    output = train_stage(
        tiny_base, inputs.shards, model=inputs.model, method=inputs.method, mix=inputs.mix, config=inputs.config,
        validation=None,
    )  # fmt: skip
    made = cache / "consolidate"

    def check():
        """What can be seen is whole; it is taken away, so that the next one has something to do."""
        for folder in [path for path in made.glob("[!.]*") if path.is_dir()]:
            assert (folder / LINEAGE).exists()
            assert consolidate(tiny_base, output, inputs.method).cached
            folder.rename(cache / f"whole-{time.monotonic_ns()}")

    hits = killed_at_random(
        cache, partial(consolidate, tiny_base, output, inputs.method), rng=random.Random(2), check=check, kills=30
    )
    assert hits >= 10
    whole = consolidate(tiny_base, output, inputs.method)
    others = [weights(path) for path in cache.glob("whole-*")]
    assert not whole.cached or others
    assert len(weights(whole.path)) == 2
    assert all(content == weights(whole.path) for content in others)
    assert [path.name for path in made.iterdir() if path.name.endswith(".partial")] == []


def test_export(tiny_base, tmp_path):
    """What has its name is whole; what a killed process leaves is hidden and in nobody's way."""
    source, out = tmp_path / "dcp", tmp_path / "out"
    state = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    torch_dcp.save(state, checkpoint_id=str(source), no_dist=True)
    whole = weights(export(source, tmp_path / "whole", base=tiny_base))

    def check():
        if out.exists():
            assert (out / "tokenizer.json").exists()
            assert weights(out) == whole
            shutil.rmtree(out)

    once = partial(export, source, out, base=tiny_base)
    assert killed_at_random(tmp_path, once, rng=random.Random(3), check=check, kills=10) >= 3
    assert weights(export(source, out, base=tiny_base)) == whole
