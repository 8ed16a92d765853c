"""A look into a few training steps of one process: a trace, tables of time, memory and floating-point operations."""

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from controlllm.config import ProfileConfig
from controlllm.errors import UserError
from controlllm.progress import console
from controlllm.train.distributed import World

ROWS = 30
"""Operations in the table."""
SNAPSHOT_EVENTS = 200_000
"""Allocations that the memory snapshot keeps at most."""


class Step(Protocol):
    def __call__(self, flops: float | None = None) -> None: ...


@contextmanager
def profile(config: ProfileConfig | None, folder: Path, world: World) -> Iterator[Step]:
    """Yield `step(flops)`, to be called after every optimizer step with this process's useful FLOPs of it, if known.

    Writes into `folder`/profile. Before the steps that `config` waits for, one step is taken to count its FLOPs, if
    asked for. Without a config and on all other processes nothing is done. UserError for a rank that does not exist.
    """
    if config is not None and config.rank >= world.size:
        raise UserError(
            f"train.profile.rank {config.rank} is not one of the {world.size} processes: use 0..{world.size - 1}"
        )
    if config is None or config.rank != world.rank:
        yield lambda flops=None: None
        return
    target = folder / "profile"
    target.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        steps = _Steps(config, target, world, stack)
        yield steps
    steps.report()


def flop_counter() -> FlopCounterMode:
    """torch's counter, with products that it does not know: in-place, grouped, and attention on the CPU."""
    return FlopCounterMode(display=False, custom_mapping=_formulas())


class _Steps:
    """First a step whose FLOPs are counted, if asked for, then those of the trace."""

    def __init__(self, config: ProfileConfig, folder: Path, world: World, stack: ExitStack):
        self.config, self.folder, self.world, self.stack = config, folder, world, stack
        self.steps = self.traced = 0
        self.files: list[str] = []
        self.kept: str | None = None
        self.counter: FlopCounterMode | None = None
        self.trace: Any = None
        if not config.flops:
            self._begin_trace()
            return
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code is one operation to the counter
        self.counter = stack.enter_context(flop_counter())

    def __call__(self, flops: float | None = None) -> None:
        self.steps += 1
        if self.counter is not None:
            self.stack.close()
            self._write_flops(self.counter, flops)
            self.counter = None
            self._begin_trace()
        elif self.trace is not None:
            self.traced += 1
            self._watch_memory()
            self.trace.step()
            if self.traced == self._wanted:
                self.stack.close()
                self.trace = None

    def report(self) -> None:
        """Where everything is, or why there is nothing."""
        kept, wanted = self.traced - self._skipped, self.config.active
        if kept < wanted:
            counted = "1 to count FLOPs, " if self.config.flops else ""
            what = f"the trace has {kept} of {wanted} steps" if self.kept else "there is no trace"
            console.print(
                f"  train.profile: {what}, because the run ended after {self.steps}: it takes {counted}"
                f"wait {self.config.wait}, warmup {self.config.warmup}, active {wanted}; lower train.profile.wait",
                style="yellow",
                markup=False,
            )
        if self.files:
            how = " (open the trace in ui.perfetto.dev or chrome://tracing)" if self.kept else ""
            console.print(f"  profile: {', '.join(self.files)} in {self.folder}{how}", markup=False)

    @property
    def _skipped(self) -> int:
        return self.config.wait + self.config.warmup

    @property
    def _wanted(self) -> int:
        return self._skipped + self.config.active

    def _begin_trace(self) -> None:
        config = self.config
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Profiler won't be using warmup")  # the recipe says so
            schedule = torch.profiler.schedule(wait=config.wait, warmup=config.warmup, active=config.active, repeat=1)
        self.trace = torch.profiler.profile(
            schedule=schedule,
            on_trace_ready=self._write,
            with_stack=config.stacks,
            profile_memory=config.memory,
            acc_events=True,
        )
        self.stack.enter_context(self.trace)
        self._watch_memory()

    def _watch_memory(self) -> None:
        """From the first step that is kept on, let the allocator of a GPU remember who asked for what."""
        if self.config.memory and self.world.device.type == "cuda" and self.traced == self._skipped:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)

    def _write(self, trace: Any) -> None:
        self.kept = self._file("trace", "json.gz")
        trace.export_chrome_trace(str(self.folder / self.kept))
        side = "device" if self.world.device.type == "cuda" else "cpu"
        events = trace.key_averages()
        tables = [events.table(sort_by=f"self_{side}_time_total", row_limit=ROWS)]
        if self.config.memory:
            tables.append(events.table(sort_by=f"self_{side}_memory_usage", row_limit=ROWS))
        (self.folder / self._file("operations", "txt")).write_text("\n".join(tables))
        if self.config.memory and side == "device":
            torch.cuda.memory._dump_snapshot(str(self.folder / self._file("memory", "pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write_flops(self, counter: FlopCounterMode, useful: float | None) -> None:
        table = _flops_table(counter, useful)
        (self.folder / "flops.txt").write_text(table)
        self.files.append("flops.txt")
        console.print(table, markup=False, end="")

    def _file(self, name: str, kind: str) -> str:
        self.files.append(f"{name}-rank{self.world.rank}.{kind}")
        return self.files[-1]


def _flops_table(counter: FlopCounterMode, useful: float | None) -> str:
    """Modules in the order of their names, equal ones of all layers together, down to a thousandth of the whole."""
    total = counter.get_total_flops()
    by_module: dict[str, int] = {}
    for module, operations in counter.get_flop_counts().items():
        name = re.sub(r"\.\d+(?=\.|$)", ".*", module)
        by_module[name] = by_module.get(name, 0) + sum(operations.values())
    rows = [(name, flops) for name, flops in sorted(by_module.items()) if name != "Global" and 1000 * flops >= total]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"{name:{width}} {flops:12.4e} {flops / max(total, 1):7.1%}" for name, flops in rows]
    told = f", useful by the formulas {useful:.4e} ({total / useful:.3f} times as many counted)" if useful else ""
    notes = "Counted as they run: attention with what its mask hides, recomputation, padding; not custom kernels."
    return "\n".join([f"FLOPs of one step of this process: {total:.4e} counted{told}", notes, *lines, ""])


def _formulas() -> dict[Any, Any]:
    aten = torch.ops.aten
    forward = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    )
    backward = (
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
        aten._scaled_dot_product_flash_attention_backward,
        aten._scaled_dot_product_efficient_attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward,
    )
    return {
        aten.addmm_: _addmm,
        aten._grouped_mm: _grouped,
        **dict.fromkeys(forward, _attention),
        **dict.fromkeys(backward, _attention_backward),
    }


def _addmm(_total: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """a (rows, k), b (groups, k, n), or both without groups: every row has one partner."""
    return 2 * a[0] * a[1] * b[-1]


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted values; key and value may have fewer heads."""
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * width * key[2]


def _attention_backward(_gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Gradients of both products, and the scores again."""
    return 5 * _attention(query, key) // 2
