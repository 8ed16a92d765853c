"""What exists in memory at each moment of an optimizer step, block by block: nothing here is measured.

The trainer's order: forward, head and loss, backward, optimizer. bench/memory.py compares it with the truth.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from controlllm.adapter_memory import gathered_whole
from controlllm.block_memory import Block, Numbers, Sizes, blocks
from controlllm.config import DDP, FSDP, DeepSpeed, RunConfig
from controlllm.errors import UserError
from controlllm.model_shape import Shape
from controlllm.prompt_memory import row_tokens, virtual_numbers

CONTEXT = {"cuda": 700_000_000, "cpu": 0}
"""CUDA context, NCCL's buffers and the workspace of matrix products."""
LIBRARIES = {"cuda": 2_500_000_000, "cpu": 600_000_000}
"""What a process with torch and transformers holds in host memory."""
LOGITS = 128 << 20
"""Most that the float32 logits of one chunk of the loss take (control/head.py)."""
OPTIMIZER_PIECE = 1 << 22
"""Numbers that an optimizer without float32 masters updates at a time (train/low_precision.py)."""

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Parts:
    """Bytes by what they are for, at the moment when their sum is largest."""

    bytes: Mapping[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def _sharding(parallel: DDP | FSDP | DeepSpeed) -> FSDP | None:
    """ZeRO-3 cuts as FSDP does; ZeRO-1 and 2 cut the optimizer's state only, gradients being there whole in between."""
    if isinstance(parallel, DeepSpeed):
        return FSDP(cpu_offload=parallel.cpu_offload) if parallel.zero_stage == 3 else None
    return parallel if isinstance(parallel, FSDP) else None


class Step:
    """One optimizer step of one process."""

    def __init__(self, shape: Shape, config: RunConfig, *, processes: int, device: Device):
        if (decoder := shape.decoder) is None:
            raise UserError(
                f"{shape.path}: memory is predicted for dense decoders whose files say hidden and intermediate size, "
                "heads and vocabulary; this one has other blocks, or its files do not say"
            )
        train = config.train
        self.decoder, self.config, self.device = decoder, config, device
        self.zero = processes if isinstance(train.parallel, DeepSpeed) else 0
        self.fsdp = _sharding(train.parallel)
        self.shards = self._shards(processes)
        self.ddp = self.fsdp is None and processes > 1
        self.accumulates = ceil(train.global_batch_size / processes) > train.micro_batch_size
        self.tokens = train.micro_batch_size * row_tokens(config)
        self.numbers = self._numbers()
        mode, attention = train.activation_checkpointing, config.model.attention
        adapter = config.lora or config.ia3
        sizes = Sizes(decoder, self.numbers, self.tokens, mode, attention, adapter, config.quantization)
        try:
            self.blocks = blocks(config, sizes, layers=shape.layers)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.everything = config.method.trains_all
        inside = sum(block.trained for block in self.blocks) + self.everything * decoder.outer
        self.trained = inside + virtual_numbers(config, decoder, shape.layers)
        self.frozen = sum(block.weights for block in self.blocks) + decoder.outer - inside

    def _shards(self, processes: int) -> int:
        if self.fsdp is None:
            return 1
        if processes == 1:
            return self.fsdp.shards or 1
        try:
            return self.fsdp.sizes(processes)[1]
        except ValueError as error:
            raise UserError(str(error)) from None

    def _numbers(self) -> Numbers:
        config, precision = self.config, self.config.train.precision
        pure = precision in ("bf16_stochastic", "bf16_kahan")
        compute = 4 if precision == "float32" else 2
        everything = config.method.trains_all
        frozen = 2 if pure else 4 if everything or config.model.dtype == "float32" else 2
        trained = 2 if pure else 4
        gathered = compute if self.fsdp and precision != "float32" and not gathered_whole(config) else None
        frozen_seen = frozen if gathered is None or (self.fsdp and self.fsdp.frozen == "replicate") else gathered
        trained_seen = trained if gathered is None else gathered
        residual = trained_seen if everything else frozen_seen
        fused = config.train.kernels == "liger" or (config.train.kernels == "auto" and self.device == "cuda")
        lean = fused or config.train.compile == "inductor"
        autocast = not pure and precision != "float32"
        return Numbers(frozen, trained, frozen_seen, trained_seen, compute, residual, autocast, lean)

    def moments(self) -> Iterator[Parts]:
        """On the device, through the last micro-batch of a step."""
        head, working = self._head_forward(), max(block.forward for block in self.blocks)
        yield self._at("forward pass", len(self.blocks), working=working, cached=True)
        yield self._at("loss", len(self.blocks), head=head, cached=True)
        yield self._at("start of the backward pass", len(self.blocks), head=self._head_backward())
        for index in reversed(range(len(self.blocks))):
            if (block := self.blocks[index]).in_graph:
                name = f"backward pass, block {index + 1} of {len(self.blocks)}"
                yield self._at(name, index + 1, working=block.working)
                if self.fsdp:
                    yield self._at(name, index, communication=self._reduced(block))
        outer = self.everything * self.decoder.embedding * self.numbers.trained_seen
        yield self._at("end of the backward pass", 0, working=outer)
        yield self._at("optimizer step", -1, working=self._optimizer_working())

    def _at(self, moment: str, done: int, *, working: int = 0, head: int = 0, communication: int = 0,
            cached: bool = False) -> Parts:  # fmt: skip
        """done: blocks whose activations exist, and none whose gradients do not; -1 after the backward pass."""
        below, above = self.blocks[: max(done, 0)], self.blocks[max(done, 0) :]
        parts = self._resting() | {
            "gradients": self._gradients(below, above, done=done),
            "weight copies": sum(block.copies for block in below) + cached * sum(block.cached for block in below),
            "gathered weights": self._gathered(below, running=bool(working)) if done >= 0 else 0,
            "activations": sum(block.kept for block in below) + (done > 0) * self._outer_kept(),
            "blends": sum(block.blend for block in below),
            "loss": head,
            "work of one block": working,
            "communication": communication or self._message_left(),
        }
        return Parts({name: int(size) for name, size in parts.items() if size}, moment)

    def _resting(self) -> dict[str, int]:
        """What is there between two steps."""
        offloaded = self._offloaded
        return {
            "frozen weights": 0 if offloaded and not self._replicated else self._frozen_bytes,
            "trained weights": 0 if offloaded else self._trained_bytes,
            "optimizer state": 0 if self._state_offloaded else self._optimizer_bytes,
            "context": CONTEXT[self.device],
        }

    @property
    def _offloaded(self) -> bool:
        return bool(self.fsdp and self.fsdp.cpu_offload and self.device != "cpu")

    @property
    def _state_offloaded(self) -> bool:
        parallel = self.config.train.parallel
        return self.device != "cpu" and not isinstance(parallel, DDP) and parallel.cpu_offload

    @property
    def _replicated(self) -> bool:
        return self.fsdp is None or self.fsdp.frozen == "replicate"

    @property
    def _frozen_bytes(self) -> int:
        whole = self.frozen * self.numbers.frozen - sum(block.saved for block in self.blocks)
        return whole // (1 if self._replicated else self.shards)

    @property
    def _trained_bytes(self) -> int:
        return self.trained * self.numbers.trained // self.shards

    @property
    def _optimizer_bytes(self) -> int:
        train, hidden = self.config.train, self.decoder.hidden
        if train.optimizer.name == "adamw_8bit":  # rows are filled up to blocks of 256, each with a float32 scale
            return int(self.trained * 2 * (1 + 4 / 256) * ceil(hidden / 256) * 256 / hidden) // self.shards
        if self.zero:
            return self.trained * 12 // self.zero  # float32 masters, too
        each = {"bf16_stochastic": 4, "bf16_kahan": 6}.get(train.precision, 8)
        return self.trained * each // self.shards

    def _optimizer_working(self) -> int:
        if self.numbers.trained == 4 or self._offloaded:
            return 0
        largest = max(self.decoder.hidden * self.decoder.intermediate, self.everything * self.decoder.embedding)
        return 20 * min(OPTIMIZER_PIECE, largest // self.shards)

    def _gradients(self, below: list[Block], above: list[Block], *, done: int) -> int:
        """DDP's buckets stay for good, FSDP's shards are made at the end; micro-batches before are summed beside."""
        size = self.numbers.trained
        every = self.trained * size
        if self.fsdp is None:
            outer = self.everything * self.decoder.outer
            if self.ddp:
                beside = sum(block.trained for block in below) + outer if self.accumulates and done >= 0 else 0
                return every + size * beside
            if self.accumulates or done < 0:
                return every
            return size * (sum(block.trained for block in above) + outer * (done < len(self.blocks)))
        waiting = 4 if self.numbers.compute != 4 else size
        unsharded = waiting * sum(block.trained for block in below) if self.accumulates and done >= 0 else 0
        offloaded = 0 if self._offloaded else size * sum(block.trained for block in above)
        sharded = (0 if self._offloaded else every) if done < 0 else offloaded
        outer = self.everything * self.decoder.outer * waiting if self.accumulates and done >= 0 else 0
        return unsharded + sharded // self.shards + outer

    def _gathered(self, below: list[Block], *, running: bool) -> int:
        """FSDP: the weights outside of blocks all the time; while a block is running, it and the next one."""
        if self.fsdp is None:
            return 0
        sizes = [self._message(block) for block in self.blocks]
        outer = 0 if self._replicated and not self.everything else self.decoder.outer * self.numbers.trained_seen
        if not self.fsdp.reshard_after_forward:
            return outer + sum(self._message(block) for block in below) + max(sizes)
        return outer + running * 2 * max(sizes)

    def _message(self, block: Block) -> int:
        """Bytes of a block's gathered weights."""
        if self._replicated:
            return block.trained * self.numbers.trained_seen
        return block.trained * self.numbers.trained_seen + (block.weights - block.trained) * self.numbers.frozen_seen

    def _message_left(self) -> int:
        """FSDP keeps the gradients it sent last until it sends the next."""
        return 4 * max(block.trained for block in self.blocks) if self.fsdp else 0

    def _reduced(self, block: Block) -> int:
        """Gradients of a block as they were computed, and as they are sent."""
        return block.trained * (self.numbers.trained_seen + 4)

    def _outer_kept(self) -> int:
        """The embedding's output where it is trained, the last norm's input."""
        hidden, numbers = self.decoder.hidden, self.numbers
        norm = hidden * (numbers.residual if numbers.lean else 4) + 4
        return self.tokens * (norm + self.everything * (not numbers.lean) * hidden * numbers.residual)

    def _head_forward(self) -> int:
        """Logits of a chunk in both types, what comes of them, the head's converted weight and its gradient."""
        numbers, decoder = self.numbers, self.decoder
        limit = 1 << max(0, (LOGITS // (4 * decoder.vocabulary)).bit_length() - 1)
        rows = min(limit, self.tokens)
        again = numbers.compute if self.tokens > limit else 0  # the slope of the chunk before
        each = (8 if numbers.compute == 4 else 10) + again
        seen = numbers.trained_seen if self.everything else numbers.frozen_seen
        converted = decoder.embedding * numbers.compute * (numbers.autocast and seen != numbers.compute)
        gradient = decoder.embedding * (4 + (numbers.compute if numbers.compute < 4 else 0)) * self.everything
        states = 3 * self.tokens * decoder.hidden * numbers.residual
        return rows * decoder.vocabulary * each + converted + gradient + states

    def _head_backward(self) -> int:
        return (
            self.everything * 8 * self.decoder.embedding + 2 * self.tokens * self.decoder.hidden * self.numbers.residual
        )

    def host_moments(self) -> Iterator[Parts]:
        """In host memory: while the weights are read, and while a checkpoint is written."""
        libraries = {"libraries": LIBRARIES[self.device]}
        weights, trained = self._frozen_bytes + self._trained_bytes, self._trained_bytes
        block = self.decoder.block * self.numbers.trained
        if self.zero or (self.fsdp and self.fsdp.version == 1):  # each process reads all before it is cut
            loading = {"weights": self.frozen * self.numbers.frozen + self.trained * self.numbers.trained}
        elif self.fsdp:  # each process reads its own share, a block at a time, into the place where it stays
            loading = {"reading one block": block} | ({"weights": weights} if self._offloaded else {})
        else:
            loading = {"reading one block": block} if self.device == "cpu" else {"weights": weights}
        yield Parts(libraries | loading, "reading the weights")
        staged = {"checkpoint staging": trained + self._optimizer_bytes}
        if self._state_offloaded and not self._offloaded:
            staged |= {"gradients": trained // self.zero, "optimizer state": self._optimizer_bytes}
        if self._offloaded:
            own = self._frozen_bytes * (not self._replicated) + trained
            staged |= {"weights": own, "gradients": trained, "optimizer state": self._optimizer_bytes}
        yield Parts(libraries | staged, "writing a checkpoint")
