"""Checkpoints of several processes: any number of them, sharded in any way, goes on with what any other wrote."""

import os
import resource
from pathlib import Path

import pytest
import torch
from ranks import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from controlllm.config import CheckpointConfig, ControlConfig
from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.errors import UserError
from controlllm.train.checkpoint import Checkpoints, trained_tensors
from controlllm.train.checkpoint_files import MANIFEST
from controlllm.train.checkpoint_tensors import named_tensors

pytestmark = pytest.mark.distributed
WAYS = {1: ("plain",), 2: ("ddp", "fsdp"), 4: ("ddp", "fsdp", "hsdp")}
EVERY_WAY = [(size, way) for size, ways in WAYS.items() for way in ways]


def model_of(world, way, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 37, "hidden_size": 20, "intermediate_size": 29, "num_hidden_layers": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    control = ControlConfig(num_expanded=2, interpolation="dlerp")
    model = expand_model(base, ControlSettings.resolve(control, num_layers=4)).train()
    if way in ("fsdp", "hsdp"):
        shape, names = ((2, 2), ("replicate", "shard")) if way == "hsdp" else ((world.size,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1, fused=True)


def step(model, optimizer, number):
    """With gradients that are the same for every way of sharding."""
    for place, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * number + place))
        parameter.grad = whole
        if isinstance(parameter, DTensor):
            parameter.grad = DTensor.from_local(whole, parameter.device_mesh, run_check=False).redistribute(
                parameter.device_mesh, parameter.placements
            )
    optimizer.step()
    optimizer.zero_grad()


def whole(model, optimizer):
    tensors = named_tensors(model, optimizer)
    return {name: full(tensor).clone() for name, tensor in tensors.items()}


def checkpoints(folder, world, **config):
    return Checkpoints(folder, CheckpointConfig(**config), world=world, identity={"run": 1})


def write_all(world, folder):
    for way in WAYS[world.size]:
        model, optimizer = model_of(world, way)
        step(model, optimizer, 1)
        step(model, optimizer, 2)
        store = checkpoints(folder / f"{world.size}-{way}", world)
        store.save(model, optimizer, {"step": 2}, best=True)
        expected = whole(model, optimizer)
        step(model, optimizer, 3)  # while it is written
        store.wait()
        if world.is_main:
            torch.save((expected, whole_trained(model)), folder / f"{world.size}-{way}.pt")
        else:
            whole_trained(model)


def read_all(world, folder):
    """Ways of writing and reading after which anything differs."""
    wrong = []
    for way in WAYS[world.size]:
        for size, written in EVERY_WAY:
            expected, later = torch.load(folder / f"{size}-{written}.pt")
            store, (model, optimizer) = checkpoints(folder / f"{size}-{written}", world), model_of(world, way, seed=1)
            same = store.restore(model, optimizer) == {"step": 2} and equal(whole(model, optimizer), expected)
            step(model, optimizer, 3)
            # A fused step rounds the last elements of a shard in another way than those in its middle.
            torch.testing.assert_close(whole_trained(model), later, rtol=1e-5, atol=1e-6)
            if not same:
                wrong.append((size, written, way))
        best = store.restore_best(model)
        if best != {"step": 2} or not all(torch.equal(t, expected[n]) for n, t in whole_trained(model).items()):
            wrong.append((size, written, way, "best"))
    return wrong


def whole_trained(model):
    return {f"model.{name}": full(tensor).clone() for name, tensor in trained_tensors(model).items()}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_any_way_of_sharding_reads_any_other_to_the_last_bit(tmp_path):
    for size in WAYS:
        run(write_all, size, tmp_path)
    for size in WAYS:
        for wrong in run(read_all, size, tmp_path):
            assert wrong == []
    sizes = {}
    for size, way in EVERY_WAY:
        folder = tmp_path / f"{size}-{way}" / "step-00000002"
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) == size
        sizes[size, way] = [shard.stat().st_size for shard in shards]
    tensors = min(sum(found) for found in sizes.values())
    for found in sizes.values():
        assert sum(found) < 1.6 * tensors  # each part is written once; headers are large for tensors this small
        assert max(found) < 1.5 * min(found)  # and by all in equal parts


def goes_wrong(world, folder):
    """What each process is told where one cannot write, or has a number that is not finite in its shard."""
    torch.set_num_threads(1)
    store, (model, optimizer) = checkpoints(folder, world), model_of(world, "fsdp")
    step(model, optimizer, 1)
    store.save(model, optimizer, {"step": 1}, wait=True)
    said = []
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    said.append(error_of(store, model, optimizer, 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    weight = next(p for name, p in model.named_parameters() if name.endswith("mlp.up_proj.weight") and p.requires_grad)
    kept = weight.to_local().clone()
    if world.rank == 1:
        weight.to_local().detach()[0, 0] = float("nan")
    said.append(error_of(store, model, optimizer, 3))
    weight.to_local().detach().copy_(kept)
    seen = sorted(os.listdir(folder))
    store.save(model, optimizer, {"step": 4}, wait=True)
    return said, seen, sorted(os.listdir(folder))


def error_of(store, model, optimizer, number):
    store.save(model, optimizer, {"step": number})
    try:
        store.wait()
    except UserError as error:
        return str(error)
    return None


def test_an_error_of_one_is_an_error_of_all(tmp_path):
    answers = run(goes_wrong, 2, tmp_path / "run")
    for (full_disk, not_finite), _, after in answers:
        assert "step-00000002: no room for a checkpoint (File too large)" in full_disk
        assert "has values that are not finite, so no checkpoint is written" in not_finite
        assert after == ["step-00000001", "step-00000004"]
    assert answers[0][1] == ["step-00000001"]  # the process that clears up


def restored_by_all(world, folder, identity):
    model, optimizer = model_of(world, "ddp")
    store = Checkpoints(folder, CheckpointConfig(), world=world, identity=identity)
    try:
        return store.restore(model, optimizer)
    except UserError as error:
        return str(error)


def test_all_go_on_from_the_same_one_or_none_does(tmp_path):
    for way in ("two", "other"):
        run(write_steps, 2, tmp_path / way)
    (tmp_path / "two" / "step-00000002" / MANIFEST).unlink()
    assert run(restored_by_all, 2, tmp_path / "two", {"run": 1}) == [{"step": 1}] * 2
    told = run(restored_by_all, 2, tmp_path / "other", {"run": 2})
    assert told[0] == told[1]
    assert "holds checkpoints of another run: run is 1 there and 2 here" in told[0]
    (tmp_path / "none").mkdir()
    assert run(restored_by_all, 2, tmp_path / "none", {"run": 1}) == [None] * 2


def write_steps(world, folder: Path):
    store, (model, optimizer) = checkpoints(folder, world), model_of(world, "ddp")
    for number in (1, 2):
        step(model, optimizer, number)
        store.save(model, optimizer, {"step": number})
    store.wait()


class Blocks8(torch.optim.AdamW):
    """Keeps something of each shard that is no slice of a whole, as states in 8 bits do."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            local = parameter.to_local()
            blocks = local.numel() // 64 + 2
            state = self.state[parameter]
            state["scales"] = torch.full((blocks,), float(torch.distributed.get_rank()))
            state["codes"] = torch.full_like(local, 3, dtype=torch.uint8)


def eight_bits(world, folder, write):
    model, _ = model_of(world, "fsdp")
    optimizer = Blocks8([p for p in model.parameters() if p.requires_grad], lr=0.1)
    store = checkpoints(folder, world)
    if write:
        step(model, optimizer, 1)
        store.save(model, optimizer, {"step": 1}, wait=True)
        return None
    try:
        store.restore(model, optimizer)
    except UserError as error:
        return str(error)
    ranks = {x for state in optimizer.state.values() for x in state["scales"].tolist()}
    codes = {x for state in optimizer.state.values() for x in state["codes"].flatten().tolist()}
    return ranks, codes


def test_what_belongs_to_one_shard_alone_goes_back_to_it(tmp_path):
    run(eight_bits, 2, tmp_path, True)
    assert run(eight_bits, 2, tmp_path, False) == [({0.0}, {3}), ({1.0}, {3})]
    for said in run(eight_bits, 4, tmp_path, False):
        assert "scales.shards-2' is not in this run; state in 8 bits goes on with the same train.parallel" in said
