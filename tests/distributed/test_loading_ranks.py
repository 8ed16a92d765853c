"""What each rank reads of the base is its shard of the model that is loaded whole, and trains the same."""

import sys
from pathlib import Path

import pytest
import ranks
import torch

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from families import tiny

pytestmark = pytest.mark.distributed
IDS = torch.randint(3, 99, (6, 9), generator=torch.Generator().manual_seed(1))
METHODS = {
    "concat": {"control": {"num_expanded": 2, "norm_relaxation": "learned"}},
    "stack": {"control": {"num_expanded": 2, "layout": "stack"}},
    "hybrid": {"control": {"num_expanded": 2, "layout": "hybrid", "interpolation": "dlerp"}},
    "lora": {"lora": {"rank": 3}},
    "partial": {"partial": {"num_blocks": 2}},
    "full": {},
}
BASES = [("Llama", True, "1MB"), ("Qwen2", False, "20KB"), ("Gemma3Text", True, "20KB"), ("Mixtral", False, "1MB")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tied and untied, in one file and in several."""
    made = []
    for family, tied, size in BASES:
        folder = tmp_path_factory.mktemp(family)
        model = tiny(family, tie_word_embeddings=tied)
        with torch.no_grad():
            for parameter in model.parameters():  # norms, too, differ from block to block
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder, max_shard_size=size)
        made.append(folder)
    return made


def settings(method, dtype="float32"):
    from controlllm.config import Method, ModelConfig

    return ModelConfig(name="base", dtype=dtype, attention="sdpa"), Method.model_validate(method)


def shard(world, model, *, frozen):
    """As the trainer does, in units of one dtype. frozen: shard, replicate, or replicas of everything."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from controlllm.control.block import ControlBlock

    if frozen == "replicas":
        mesh = init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world.size,))
    whole = {p for p in model.parameters() if not p.requires_grad} if frozen == "replicate" else None
    for layer in model.model.layers:
        pair = [layer.expanded, layer.frozen] if isinstance(layer, ControlBlock) else []
        for part in [*pair, layer]:  # an interpolation is not called as a module: it belongs to the block
            fully_shard(part, mesh=mesh, ignored_params=whole)
    return fully_shard(model, mesh=mesh, ignored_params=whole)


def compare(world, bases, cases):
    from torch.distributed.tensor import DTensor, distribute_tensor

    from controlllm.train import weights
    from controlllm.train.model import load_model
    from controlllm.train.weights import empty_model, fill

    read, sharded = [], 0
    plain_read = weights.read_range
    weights.read_range = lambda *place: read.append(plain_read(*place)) or read[-1]
    for base in bases:
        for method, dtype, frozen in cases:
            want = load_model(base, *settings(METHODS[method], dtype), seed=5)
            got = shard(world, empty_model(base, *settings(METHODS[method], dtype), seed=5), frozen=frozen)
            read.clear()
            fill(got, base, device="cpu", world=world)
            here = [t.to_local() if isinstance(t, DTensor) else t for t in got.parameters()]
            assert sum(part.numel() for part in read) <= sum(part.numel() for part in here)
            tensors = dict([*got.named_parameters(remove_duplicate=False), *got.named_buffers()])
            for name, tensor in [*want.named_parameters(remove_duplicate=False), *want.named_buffers()]:
                mine = tensors.pop(name)
                assert mine.requires_grad == tensor.requires_grad, (base, method, name)
                if isinstance(mine, DTensor):
                    sharded += 1
                    tensor = distribute_tensor(tensor.detach(), mine.device_mesh, mine.placements).to_local()
                    mine = mine.to_local()
                assert mine.dtype == tensor.dtype, (base, method, name)
                assert torch.equal(mine, tensor), (base, method, name)
            assert not tensors
            assert (got.lm_head.weight is got.model.embed_tokens.weight) == got.config.tie_word_embeddings
    return sharded


CASES = {
    2: [("stack", "float32", "shard"), ("hybrid", "bfloat16", "replicate"), ("full", "float32", "replicas")],
    3: [("concat", "bfloat16", "shard"), ("lora", "float32", "shard"), ("partial", "bfloat16", "replicate")],
}


@pytest.mark.parametrize("size", CASES)
def test_a_rank_reads_its_shard_of_the_loaded_model(bases, size):
    assert min(ranks.run(compare, size, bases, CASES[size])) > 100


def step(world, base, method, frozen):
    """Weights after a step over the rows of all, and the loss of the next."""
    from torch.distributed.tensor import DTensor

    from controlllm.train.model import load_model
    from controlllm.train.weights import empty_model, fill

    if world.size > 1:
        model = shard(world, empty_model(base, *settings(METHODS[method])), frozen=frozen)
        fill(model, base, device="cpu", world=world)
    else:
        model = load_model(base, *settings(METHODS[method]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = IDS[world.rank :: world.size]
    counts = {"num_items_in_batch": IDS[:, 1:].numel()}
    if "control" in METHODS[method]:
        counts["num_tokens_in_batch"] = IDS.numel()
    for _ in range(2):
        loss = model(input_ids=rows, labels=rows, **counts).loss
        (loss * world.size).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return world.sum(loss.detach()).item(), {n: p.detach().tolist() for n, p in weights.items() if p.requires_grad}


def steps(world, base, cases):
    return [step(world, base, *case) for case in cases]


def test_a_filled_model_trains_as_the_loaded_one(bases):
    cases = [("hybrid", "shard"), ("concat", "replicate"), ("lora", "shard")]
    (wanted,) = ranks.run(steps, 1, bases[0], cases)
    for found in ranks.run(steps, 2, bases[0], cases):
        for (loss, weights), (want_loss, want) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(want_loss, abs=1e-6)
            assert weights.keys() == want.keys()
            for name, values in weights.items():
                torch.testing.assert_close(torch.tensor(values), torch.tensor(want[name]), atol=2e-5, rtol=1e-4)
