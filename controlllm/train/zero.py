"""What a DeepSpeed engine trains, by parameter: for checkpoints, which are those of every other way of sharing, and for
the end of a run.

ZeRO keeps float32 masters and optimizer state as slices of flat buffers (stages 1 and 2) or of each parameter (stage
3). Here they are seen as what FSDP2 has: tensors sharded by rows, in CPU memory.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional

from controlllm.config import DeepSpeed, TrainConfig
from controlllm.control.schedule import scheduled_names
from controlllm.errors import UserError
from controlllm.train.distributed import World
from controlllm.train.pieces import rows
from controlllm.train.zero_config import zero_config

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_start(config: TrainConfig, world: World) -> None:
    """Before the model is loaded. UserError where the processes or the device do not fit DeepSpeed's settings."""
    parallel = config.parallel
    if not isinstance(parallel, DeepSpeed):
        return
    here = os.environ.get("LOCAL_WORLD_SIZE")
    zero_config(config, processes=world.size, nodes_of=int(here) if here else None)
    if "RANK" not in os.environ:
        raise UserError(
            "train.parallel.kind deepspeed shards over the processes of a launcher: start with torchrun "
            "(python -m torch.distributed.run --nproc-per-node N -m controlllm.cli train ...), or use ddp"
        )
    if (parallel.qwz or parallel.qgz) and world.device.type == "cpu":
        raise UserError(
            f"train.parallel.{'qwz' if parallel.qwz else 'qgz'}: DeepSpeed quantises on GPUs only; leave it out"
        )


def start_deepspeed() -> None:
    """Before anything else of DeepSpeed is called."""
    import deepspeed
    from deepspeed.runtime import torch_autocast

    deepspeed.utils.logger.setLevel("WARNING")
    # The Trainer accumulates by itself and tells accelerate 1; the settings have the true number.
    logging.getLogger("accelerate.accelerator").addFilter(lambda record: "steps mismatch" not in record.getMessage())
    torch_autocast._WARNED_NESTED_AUTOCAST = True  # it is on inside the model: `autocast_inside`
    # Compiled when processes meet on CPUs, which takes minutes; only its inference would use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def leave_deepspeed() -> None:
    """Take back what DeepSpeed, accelerate and transformers would go by in whatever this process does next."""
    from accelerate.state import AcceleratorState
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", functional.linear)


class ZeroState:
    """The optimizer of a DeepSpeed engine, as training and checkpoints use one.

    Made right after the engine, whose client optimizer is torch's AdamW; all methods are called by all processes.
    """

    def __init__(self, engine: Any):
        self.zero = engine.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._make_state()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def scale_losses(self, by: float) -> None:
        """What the engine multiplies losses with before their backward pass, and divides gradients by in its step."""
        self.zero.override_loss_scale(by)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The engine has done so in its step."""

    def tensors(self, model: nn.Module, *, with_optimizer: bool = True) -> dict[str, Tensor]:
        """`model.<parameter>` and `optimizer.<parameter>.<key>`, copied; one whole parameter is gathered at a time."""
        named = {}
        for name, parameter in _trained(model):
            named[f"model.{name}"] = rows(master(parameter), self._mesh)
            if with_optimizer and parameter.requires_grad:
                for key in MOMENTS:
                    named[f"optimizer.{name}.{key}"] = rows(master(parameter, key), self._mesh)
                named[f"optimizer.{name}.step"] = self._states()[0]["step"].cpu().clone()
        return named

    def take(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors of such names, shapes and sharding into the engine's own places."""
        for name, parameter in _trained(model):
            _put(parameter, _full(tensors[f"model.{name}"]))
            for key in MOMENTS:
                if (moment := tensors.get(f"optimizer.{name}.{key}")) is not None:
                    _put(parameter, _full(moment), key)
            if (step := tensors.get(f"optimizer.{name}.step")) is not None:
                for state in self._states():
                    state["step"].copy_(step)

    def _make_state(self) -> None:
        """Zeros for the flat buffers that took the parameters' place, from the start."""
        self.optimizer.state.clear()
        for flat in self._flat():
            moments = {key: torch.zeros_like(flat.detach()) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device)} | moments
        if hasattr(self.zero, "single_partition_of_fp32_groups"):
            self.zero._lazy_init_hp_params_optimizer_state()  # stages 1 and 2: which slice is whose

    def _flat(self) -> list[Tensor]:
        zero = self.zero
        parts = "fp32_partitioned_groups_flat"
        return getattr(zero, parts) if hasattr(zero, parts) else zero.single_partition_of_fp32_groups

    def _states(self) -> list[dict[str, Tensor]]:
        return [self.optimizer.state[flat] for flat in self._flat()]


def master(parameter: Any, key: str | None = None) -> Tensor:
    """The float32 master of a parameter, or its optimizer state `key`, gathered; of a frozen one itself.

    Every process calls this.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if parameter.requires_grad:
        gathered = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
        assert gathered is not None
        return gathered.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _trained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    moved = set(scheduled_names(model))
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad or name in moved)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _put(parameter: Any, full: Tensor, key: str | None = None) -> None:
    """The opposite of `master`, into the weights that the model computes with, too."""
    if not hasattr(parameter, "ds_id"):  # stages 1 and 2
        if parameter.requires_grad:
            _put_flat(parameter, full, key)
        if key is None:
            parameter.data.copy_(full)
        return
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    own = _own_part(parameter, full)
    if key is not None:
        safe_set_local_optimizer_state(parameter, own, key)
        return
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, own)
    parameter.ds_tensor.data.copy_(own)
    if parameter.numel():  # small ones stay gathered
        parameter.data.copy_(full)


def _put_flat(parameter: Any, full: Tensor, key: str | None) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if key is None:
        safe_set_full_fp32_param(parameter, full)
    else:
        safe_set_full_optimizer_state(parameter, full, key)


def _own_part(parameter: Any, full: Tensor) -> Tensor:
    """What stage 3 keeps of it in this process: a slice of the flat tensor, the last one padded."""
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    part = full.new_zeros(size)
    own = full.flatten()[dist.get_rank(group) * size :][:size]
    part[: len(own)] = own
    return part
