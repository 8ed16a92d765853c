"""torch's older FSDP (`train.parallel.version: 1`), which shards units of flat parameters."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp._common_utils import TrainingState
from torch.distributed.fsdp._runtime_utils import _reshard  # its own hooks' function: there is no public one
from torch.distributed.tensor import DTensor

from controlllm.config import FSDP, TrainConfig
from controlllm.control.block import ControlBlock
from controlllm.control.expand import control_blocks, decoder_layers
from controlllm.errors import UserError
from controlllm.train.adapters import has_factors
from controlllm.train.distributed import World
from controlllm.train.pieces import Piece, rows
from controlllm.train.precision import shard_dtypes
from controlllm.train.trained import ordinary_name, trained_tensors, whole

Shard = Callable[..., nn.Module]
MOMENTS = ("exp_avg", "exp_avg_sq")


def shard_flat(model: Any, world: World, mesh: DeviceMesh, config: TrainConfig) -> FullyShardedDataParallel:
    """Every block for itself, the two of a pair one after the other, the embedding, then the rest, in place.

    mesh: (shards,) or (replicas, shards). The result is what is to be called; each parameter that was sharded says in
    `parameter.piece` what it was. UserError where types do not fit into one unit.
    """
    parallel, device = config.parallel, world.device
    assert isinstance(parallel, FSDP)
    shapes = {parameter: parameter.shape for parameter in model.parameters()}
    replicated = _frozen(model) if parallel.frozen == "replicate" else set()
    for parameter in replicated:
        parameter.data = parameter.data.to(device)
    wrap = partial(
        FullyShardedDataParallel, device_id=device, use_orig_params=True, ignored_states=list(replicated),
        cpu_offload=CPUOffload(parallel.cpu_offload and device.type != "cpu"),  # a CPU is there already
        **_strategy(mesh, reshard=parallel.reshard_after_forward),
    )  # fmt: skip
    placed = set(replicated)
    param_dtype, reduce_dtype = shard_dtypes(config)

    def shard(part: nn.Module, *, precise: bool = False, root: bool = False) -> nn.Module:
        own = set(part.parameters()) - placed
        placed.update(own)
        _require_one_dtype(part, own)
        # Autocast decides the types inside; inputs such as positions and hidden states stay as they are.
        gathered = None if precise else param_dtype
        policy = MixedPrecision(gathered, reduce_dtype, cast_forward_inputs=False, cast_root_forward_inputs=False)
        return wrap(part, mixed_precision=policy) if own or root else part

    _shard_layers(decoder_layers(model.base_model), shard)
    if (embedding := model.get_input_embeddings()).weight is not model.get_output_embeddings().weight:
        model.set_input_embeddings(shard(embedding))
    module = shard(model, root=True)
    assert isinstance(module, FullyShardedDataParallel)
    _mark({p: shape for p, shape in shapes.items() if p not in replicated}, mesh, device)
    _call_whole(model, module)
    return module


def let_go(module: FullyShardedDataParallel) -> None:
    """Free what forward passes have gathered, so that the shards are what counts, also after they were written to."""
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if unit._is_root is not None and handle:  # None before the first pass
            _reshard(unit, handle, True)


def accumulating(module: FullyShardedDataParallel) -> AbstractContextManager[None]:
    """Around the passes of a micro-batch before the last: gradients are exchanged later, where float32 keeps them.

    Whole gradients stay in the type that is computed in; shards add up in float32, which offloaded ones cannot.
    """
    in_float32 = module.mixed_precision.param_dtype is None
    return module.no_sync() if in_float32 or module.cpu_offload.offload_params else nullcontext()


class FSDP1State:
    """The optimizer of a model that `shard_flat` has sharded, for checkpoints: those of every other way of sharing.

    Parameters must be their shards (`let_go`). All methods are called by all processes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def tensors(self, model: nn.Module, *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """`model.<parameter>` and `optimizer.<parameter>.<key>`, copied; one whole tensor is gathered at a time."""
        named, steps = {}, self._steps(model)
        for name, parameter in _parameters(model):
            named[f"model.{name}"] = rows(whole(parameter), self._mesh)
            if with_optimizer and parameter.requires_grad:
                state = self.optimizer.state[parameter]
                for key in MOMENTS:
                    named[f"optimizer.{name}.{key}"] = rows(parameter.piece.whole(state[key]), self._mesh)
                named[f"optimizer.{name}.step"] = steps[name].clone()
        return named

    def take(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put such tensors where they belong."""
        for name, parameter in _parameters(model):
            _put(parameter, parameter.piece, tensors[f"model.{name}"])
            state = self.optimizer.state.get(parameter, {})
            for key, own in state.items():
                if (saved := tensors.get(f"optimizer.{name}.{key}")) is None:
                    continue
                if key == "step":
                    own.copy_(saved)
                else:
                    _put(own, parameter.piece, saved)

    def _steps(self, model: nn.Module) -> dict[str, Tensor]:
        """Of each trained parameter; a process that has nothing of one has not counted."""
        trained = [(name, p) for name, p in _parameters(model) if p.requires_grad]
        steps = torch.stack([self.optimizer.state[p]["step"].cpu() for _, p in trained])
        dist.all_reduce(steps, dist.ReduceOp.MAX, group=self._mesh.get_group())
        return {name: step for (name, _), step in zip(trained, steps, strict=True)}


def _frozen(model: Any) -> set[nn.Parameter]:
    """Weights that stay as they are; an alpha may be moved by a schedule."""
    alphas = {p for block in control_blocks(model) for p in block.interpolation.parameters()}
    return {p for p in model.parameters() if not p.requires_grad} - alphas


def _strategy(mesh: DeviceMesh, *, reshard: bool) -> dict[str, Any]:
    """Between which processes, and when, parameters are gathered."""
    if mesh.size(mesh.ndim - 1) == 1:  # torch would not even sum over the replicas
        raise UserError(f"train.parallel.version 1: {mesh.size()} replicas of one process shard nothing; use kind: ddp")
    if mesh.ndim == 1:
        strategy = ShardingStrategy.FULL_SHARD if reshard else ShardingStrategy.SHARD_GRAD_OP
        return {"sharding_strategy": strategy, "process_group": mesh.get_group()}
    strategy = ShardingStrategy.HYBRID_SHARD if reshard else ShardingStrategy._HYBRID_SHARD_ZERO2
    return {"sharding_strategy": strategy, "process_group": (mesh.get_group("shard"), mesh.get_group("replicate"))}


def _shard_layers(layers: nn.ModuleList, shard: Shard) -> None:
    for index, layer in enumerate(layers):
        pair = isinstance(layer, ControlBlock)
        if pair:
            layer.frozen, layer.expanded = shard(layer.frozen), shard(layer.expanded)
        factors = has_factors(layer)
        if not factors:  # which are read from outside the modules that have them
            for parent, name in list(_adapter_matrices(layer)):
                setattr(parent, name, shard(getattr(parent, name)))
        # What is left of a pair are the alphas, few and precise.
        layers[index] = shard(layer, precise=pair or factors)


def _adapter_matrices(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """LoRA's modules with trained weights: in a unit with frozen ones, gradients of these would be kept, too."""
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in ("lora_A", "lora_B"):
            yield from ((module, child) for child, _ in module.named_children())


def _require_one_dtype(part: nn.Module, own: set[nn.Parameter]) -> None:
    if len(types := sorted({str(parameter.dtype).removeprefix("torch.") for parameter in own})) > 1:
        raise UserError(
            f"train.parallel.version 1 shards {type(part).__name__} as one flat tensor, which cannot hold both "
            f"{' and '.join(types)}: set model.dtype to float32, or version to 2"
        )


def _mark(shapes: dict[Any, torch.Size], mesh: DeviceMesh, device: torch.device) -> None:
    """Tell each parameter whose part it is now."""
    group = mesh.get_group(mesh.ndim - 1)
    mine = [parameter.numel() for parameter in shapes]
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group=group)
    for (parameter, shape), sizes in zip(shapes.items(), zip(*everyones, strict=True), strict=True):
        parameter.piece = Piece(shape, sizes, group, device)


def _call_whole(model: Any, module: FullyShardedDataParallel) -> None:
    """Let the model itself be called, as generation does, and not what gathers the parameters outside its blocks."""
    plain = model.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if module.training_state is not TrainingState.IDLE:
            return plain(*args, **kwargs)
        with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
            return plain(*args, **kwargs)

    model.forward = forward


def _parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What is trained or moved, by the names that it has in other ways of sharing."""
    return ((ordinary_name(name), model.get_parameter(name)) for name in trained_tensors(model))


@torch.no_grad()
def _put(own: Tensor, piece: Piece, saved: Tensor) -> None:
    full = saved.full_tensor() if isinstance(saved, DTensor) else saved
    own.copy_(piece.part(full).view(own.shape))
