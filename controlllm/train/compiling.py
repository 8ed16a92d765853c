"""torch.compile, block by block: in place, so that names stay; the two blocks of a pair each for themselves.

Row lengths are marked as changing from the start: blocks of one kind share one compiled form for all lengths.
"""

from typing import Any

from controlllm.control.block import attention_of
from controlllm.control.expand import control_blocks
from controlllm.errors import UserError
from controlllm.train import attention
from controlllm.train.activations import Recomputed, inner_blocks
from controlllm.train.prompt import virtual_tokens_of

MOST_FORMS = 64
"""Compiled forms of one family's block: frozen or trained, with and without gradient, of each layer type and dtype."""


def compile_blocks(model: Any, backend: str) -> None:
    """Compile every block's forward and backward pass with a backend of torch's; none leaves the model as it is.

    To be called after checkpoint_activations. The packed attention runs as it is between two compiled parts: its plan
    depends on the documents' lengths. So does one that sees a prefix. UserError for what compiled code would silently
    leave out.
    """
    if backend == "none":
        return
    if any(block.divergence_name == "attention" for block in control_blocks(model)):
        raise UserError(
            f"train.compile {backend} and control.divergence attention do not go together: the attention maps are read "
            "by hooks, which compiled blocks do not run; set train.compile to none"
        )
    import torch._dynamo.config  # takes seconds, and most runs do without

    torch._dynamo.config.recompile_limit = MOST_FORMS
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise the rest of the run is not compiled, silently
    torch._dynamo.config.optimize_ddp = False  # it cuts graphs at buckets: blocks are smaller than those
    packed = model.config._attn_implementation == attention.NAME
    if packed:
        attention.register(compiled=True)
    virtual = virtual_tokens_of(model)
    prefix = virtual is not None and virtual.kind == "prefix"
    if prefix:  # it takes the layer's own states: compiled, each layer would be a form of its own
        for layer in map(attention_of, inner_blocks(model)):
            layer.forward = torch.compiler.disable(layer.forward)
    for block in inner_blocks(model):
        # torch does not compile what is inside a checkpoint that it cannot see whole.
        if (packed or prefix) and isinstance(block.forward, Recomputed):
            block.forward.forward = torch.compile(block.forward.forward, backend=backend, dynamic=True)
        else:
            block.compile(backend=backend, dynamic=True)
