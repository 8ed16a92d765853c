"""What adapters add to a decoder block's memory: their numbers, and what autograd keeps of each token for them."""

from controlllm.config import IA3Config, LoRAConfig, RunConfig
from controlllm.model_shape import Decoder

Adapter = LoRAConfig | IA3Config
ADAPTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def targets(adapter: Adapter | None) -> set[str]:
    """Linear maps with something that is trained: all without adapters, because then their weights are."""
    if adapter is None or isinstance(adapter.target_modules, str):
        return set(ADAPTED)
    return ADAPTED & _last(adapter.target_modules)


def adapter_weights(decoder: Decoder, adapter: Adapter | None) -> int:
    """Numbers in the adapters of one block."""
    if adapter is None:
        return 0
    sides = _sides(decoder, adapter)
    if isinstance(adapter, IA3Config):
        scaled = _last(adapter.feedforward_modules)
        return sum(inner if name in scaled else outer for name, (inner, outer) in sides.items())
    return sum(adapter.rank * (inner + outer) + adapter.dora * outer for inner, outer in sides.values())


def adapter_kept(decoder: Decoder, adapter: Adapter | None, *, compute: int) -> int:
    """Bytes per token beside the inputs of adapted maps. compute: bytes of a number in products."""
    if adapter is None:
        return 0
    sides = _sides(decoder, adapter)
    if isinstance(adapter, IA3Config):  # outputs before they are scaled; inputs in the factors' float32
        scaled = _last(adapter.feedforward_modules)
        return sum(4 * inner if name in scaled else compute * outer for name, (inner, outer) in sides.items())
    # The inner state; of DoRA the outputs of map and adapter.
    return compute * sum(adapter.rank + 2 * adapter.dora * outer for _, outer in sides.values())


def adapter_products(decoder: Decoder, adapter: Adapter | None) -> int:
    """Numbers per token that come out of adapters' products."""
    if not isinstance(adapter, LoRAConfig):
        return 0
    return sum(outer + adapter.rank for _, outer in _sides(decoder, adapter).values())


def length_products(decoder: Decoder, adapter: Adapter | None) -> int:
    """Bytes of the products that DoRA's lengths are made of, once for all tokens."""
    if not (isinstance(adapter, LoRAConfig) and adapter.dora):
        return 0
    return sum(4 * adapter.rank * (2 * outer + adapter.rank) for _, outer in _sides(decoder, adapter).values())


def linears(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a block's linear maps."""
    hidden, inner = decoder.hidden, decoder.intermediate
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    return {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip


def gathered_whole(config: RunConfig) -> bool:
    """Whether FSDP gathers the numbers of blocks with adapters as they are stored (train/parallel.py)."""
    shared = config.control is not None and config.control.twin != "full"
    return shared or config.ia3 is not None or (config.lora is not None and config.lora.dora)


def _sides(decoder: Decoder, adapter: Adapter) -> dict[str, tuple[int, int]]:
    return {name: sides for name, sides in linears(decoder).items() if name in targets(adapter)}


def _last(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}
