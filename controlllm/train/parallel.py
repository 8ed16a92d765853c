"""The one place where a model that knows nothing of processes is spread over them.

The order matters and stands here once: kernels, activation checkpointing, compilation, then DDP, FSDP2, HSDP or torch's
older FSDP.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from controlllm.config import FSDP, TrainConfig
from controlllm.control.block import ControlBlock
from controlllm.control.expand import decoder_layers
from controlllm.control.loss import forward_with_loss
from controlllm.data.loader import Batch
from controlllm.errors import UserError
from controlllm.train.activations import checkpoint_activations
from controlllm.train.adapters import has_factors
from controlllm.train.compiling import compile_blocks
from controlllm.train.distributed import World
from controlllm.train.flops import StepCost, step_cost
from controlllm.train.fsdp1 import accumulating, let_go, shard_flat
from controlllm.train.kernels import use_kernels
from controlllm.train.precision import autocast_inside, cast_model, shard_dtypes, to_float8
from controlllm.train.twins import shares_weights

Fill = Callable[[Any], None]


class Parallel:
    """A model spread over the processes of a run. Called with a batch and its counts, it gives the loss."""

    def __init__(self, model: Any, module: nn.Module, world: World, cost: StepCost | None):
        self.model, self.module, self.world, self.cost = model, module, world, cost

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """A batch as keyword arguments, on this process's device."""
        given, device = batch.arguments(self.model.config._attn_implementation), self.world.device
        return {name: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in given.items()}

    def flops(self, batch: Batch) -> float:
        """Useful FLOPs of a forward and backward pass; 0 where they are not known."""
        if self.cost is None or not batch.targets:
            return 0.0
        return self.cost.step(batch.cu_seq_lens_q.diff().tolist(), targets=batch.targets)

    @property
    def gradient_factor(self) -> int:
        """What a loss is multiplied with before its backward pass: DDP and FSDP average, we want the sum."""
        return self.world.size

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.module, FSDPModule | FullyShardedDataParallel)

    def settle(self) -> None:
        """After passes without a backward pass, which would have done it: let go of what was gathered for them.

        Until then the parameters that are seen are not the shards.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        if isinstance(self.module, FullyShardedDataParallel):
            let_go(self.module)

    def synchronised(self, on: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch: whether gradients are exchanged at its end."""
        if isinstance(self.module, FSDPModule):
            return _sharded_sync(self.module, on)
        if isinstance(self.module, FullyShardedDataParallel) and not on:
            return accumulating(self.module)
        if isinstance(self.module, DistributedDataParallel) and not on:
            return self.module.no_sync()
        return nullcontext()


@contextmanager
def _sharded_sync(module: FSDPModule, on: bool) -> Iterator[None]:
    module.set_requires_gradient_sync(on)
    yield


def parallelize(model: Any, world: World, config: TrainConfig, *, fill: Fill | None = None) -> Parallel:
    """Spread `model` over the processes of `world`, in place; DDP and DeepSpeed are left to transformers' Trainer where
    that is the trainer: it sets `Parallel.module`.

    fill: reads the weights of a model that is still empty (on the meta device), after it was cut into shards.
    UserError where sizes or settings do not fit the processes.
    """
    cost = step_cost(model)
    _attach_loss(model)
    if config.parallel.kind == "deepspeed":
        autocast_inside(model, config, world.device)
    cast_model(model, config)
    to_float8(model, config, world.device)
    use_kernels(model, config.kernels, world.device)
    checkpoint_activations(model, config.activation_checkpointing)
    compile_blocks(model, config.compile)
    if isinstance(config.parallel, FSDP) and config.parallel.version == 2:
        _shard(model, device_mesh(world, config.parallel), config)
        if fill:
            fill(model)
        return Parallel(model, model, world, cost)
    if fill:
        fill(model)
    if isinstance(config.parallel, FSDP) and world.size > 1:
        return Parallel(model, shard_flat(model, world, device_mesh(world, config.parallel), config), world, cost)
    if config.parallel.kind != "deepspeed":
        model.to(world.device)  # who else shards it places it, too
    if world.size == 1 or config.trainer == "transformers":
        return Parallel(model, model, world, cost)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Parallel(model, ddp, world, cost)


def device_mesh(world: World, config: FSDP) -> DeviceMesh:
    """(shards,) for FSDP, (replicas, shards) for HSDP; the launcher says how many processes there are."""
    try:
        replicas, shards = config.sizes(world.size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not torch.distributed.is_initialized():
        raise UserError(
            "train.parallel.kind fsdp shards over the processes of a launcher: start with torchrun "
            "(python -m torch.distributed.run --nproc-per-node N -m controlllm.cli train ...), or use ddp"
        )
    if replicas == 1:
        return init_device_mesh(world.device.type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def _shard(model: Any, mesh: DeviceMesh, config: TrainConfig) -> None:
    """Every block for itself, the two of a pair one after the other, embedding and head, then the rest."""
    parallel = config.parallel
    assert isinstance(parallel, FSDP)
    replicated = {p for p in model.parameters() if not p.requires_grad} if parallel.frozen == "replicate" else set()
    param_dtype, reduce_dtype = shard_dtypes(config)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if parallel.cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": offload, "ignored_params": replicated}
    # Autocast decides the types inside; inputs such as positions and hidden states stay as they are.
    gathered_small = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
    gathered_whole = MixedPrecisionPolicy(None, reduce_dtype, cast_forward_inputs=False)

    def shard(part: nn.Module, policy: MixedPrecisionPolicy, *, reshard: bool = parallel.reshard_after_forward) -> None:
        if any(p not in replicated for p in part.parameters()):
            fully_shard(part, mp_policy=policy, reshard_after_forward=reshard, **options)

    for layer in decoder_layers(model.base_model):
        if shares_weights(layer):
            shard(layer, gathered_whole)  # together, because a parameter is in one unit only
        elif isinstance(layer, ControlBlock):
            shard(layer.frozen, gathered_small)
            shard(layer.expanded, gathered_small)
            shard(layer, gathered_whole)  # what is left: the alphas, few and precise
        else:
            shard(layer, gathered_whole if has_factors(layer) else gathered_small)
    _shard_ends(model, partial(shard, policy=gathered_small))
    fully_shard(model, mp_policy=gathered_small, **options)


def _shard_ends(model: Any, shard: Callable[..., None]) -> None:
    """Embedding and head each for itself: gathered with the rest, both would lie there whole all through the step.

    One matrix for both stays with the rest. An embedding's backward pass needs no weight; a head's begins where its
    forward pass ends.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight:
        return
    shard(embedding, reshard=True)
    if isinstance(embedding, FSDPModule):
        embedding.set_unshard_in_backward(False)
    shard(head, reshard=False)


def _attach_loss(model: Any) -> None:
    """Let the model's own call give the loss, so that the hooks of DDP and FSDP are run around all of it."""
    plain = model.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if "num_items_in_batch" in kwargs:
            return forward_with_loss(model, *args, **kwargs)
        return plain(*args, **kwargs)

    model.forward = forward
