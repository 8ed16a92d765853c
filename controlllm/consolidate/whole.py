"""Through the model in memory: for adapters that are merged, virtual tokens, quantised bases, converted families."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from controlllm.config import Method, ModelConfig
from controlllm.config.export import ExportConfig
from controlllm.consolidate.companions import model_name
from controlllm.consolidate.writing import GIGABYTE

Alphas = Callable[[Any], dict[int, float]]


def needs_whole(method: Method) -> bool:
    """Whether more is to be done than to put trained tensors in the place of others."""
    return bool(method.lora or method.ia3 or method.prompt or method.quantization)


def trained_model(base: Path, trained: Path, method: Method) -> Any:
    """trained: a file. In float32; UserError where the two do not fit."""
    from controlllm.train.model import load_model
    from controlllm.train.trained import load_trained

    model = load_model(base, ModelConfig(name=str(base), attention="eager"), method)  # of a row that is not packed
    load_trained(trained, model)
    if method.quantization:
        from controlllm.train.quantize import dequantise_

        dequantise_(model)
    return model


def save_whole(
    base: Path, trained: Path, method: Method, export: ExportConfig, folder: Path, *, tokenizer: Any, alphas: Alphas
) -> Any:
    """Write the weights; returns the model, whose config.lineage says what was done.

    Adapters are merged, so that the model is a plain one; they are kept in `adapter/`, as PEFT reads them. Adapters of
    twins make the twin a full one, and the model an ordinary expanded one; PEFT has no form for them alone. Weights
    that were quantised for training are written as the plain numbers they stood for, because that is what was trained
    against.
    """
    from controlllm.control.expand import control_blocks

    model = trained_model(base, trained, method)
    done: dict[str, Any] = {"quantization": method.quantization.model_dump()} if method.quantization else {}
    if method.lora or method.ia3:
        from controlllm.merging import merge
        from controlllm.train.adapters import save_adapter

        if not method.control:
            save_adapter(model, folder / "adapter", base_name=model_name(base))
        done["merge"] = merge(model, tokenizer)
    if method.prompt:
        from controlllm.train.prompt import detach
        from controlllm.train.prompt_files import save_prompt

        save_prompt(detach(model), model.config, folder / "adapter", base_name=model_name(base))
    if export.form == "folded" and control_blocks(model):
        from controlllm.control.fold import fold_model

        chosen = alphas(model)
        model = fold_model(model, chosen)
        done["folded"] = [{"alphas": chosen}]
    model.config.lineage = done
    return save_model(model, folder, export, base)


def save_model(model: Any, folder: Path, export: ExportConfig, base: Path) -> Any:
    """In the dtype that is asked for, but for what the architecture keeps in float32."""
    from controlllm.consolidate.plan import export_dtype, kept_in_float32
    from controlllm.control.tensor_files import DTYPES, read_header
    from controlllm.train.weight_files import weight_files

    dtype = export_dtype(export, [tensor for file in weight_files(base) for tensor in read_header(file).values()])
    kept = kept_in_float32(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not kept(name):
            tensor.data = tensor.data.to(DTYPES[dtype])
    model.config.use_cache = True
    model.eval().save_pretrained(folder, max_shard_size=int(export.max_shard_gb * GIGABYTE))
    return model
