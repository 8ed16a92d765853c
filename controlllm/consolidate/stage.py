"""Stage 4: base and trained tensors to one Hugging Face directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlllm.config import Method
from controlllm.config.export import ExportConfig
from controlllm.errors import UserError
from controlllm.store import Output, run_stage


def consolidate(base: Path, trained: Path, method: Method, export: ExportConfig | None = None) -> Output:
    """Everything `AutoModelForCausalLM.from_pretrained` needs, for twins after `import controlllm`, and nothing else.

    Tensors go from file to file; only where adapters are merged, for virtual tokens, quantised bases, and families
    whose files transformers converts, is the model built in memory. What merging cost stands in config.json, under
    `lineage.merge`; of quantised bases `lineage.quantization` says so.
    """
    export = export or ExportConfig()

    def build(folder: Path) -> None:
        from controlllm.consolidate.companions import run_lineage

        build_model(base, trained / "trained.safetensors", method, export, folder, lineage=run_lineage(base, trained))

    parents = {"ingest model": base, "train": trained}
    return run_stage("consolidate", config=dict(method) | {"export": export}, parents=parents, build=build)


def build_model(
    base: Path, trained: Path, method: Method, export: ExportConfig, folder: Path, *, lineage: Mapping[str, Any]
) -> None:
    """Write the model that a file of trained tensors makes of the base. UserError where the two do not fit."""
    from controlllm.consolidate.alphas import alphas_for
    from controlllm.consolidate.companions import load_tokenizer, save_companions
    from controlllm.consolidate.plan import plan_run
    from controlllm.consolidate.whole import needs_whole, save_whole, trained_model
    from controlllm.consolidate.writing import write_weights
    from controlllm.control.tensor_files import read_header
    from controlllm.progress import console
    from controlllm.train.weight_files import Converted

    if not trained.exists():
        raise UserError(f"{trained}: not found; run controlllm train again")
    tokenizer = load_tokenizer(base)
    alphas = alphas_for(export, lambda: trained_model(base, trained, method), tokenizer)
    try:
        if needs_whole(method):
            plan = None
        else:
            plan = plan_run(base, method, read_header(trained), export, place=trained, alphas=alphas)
    except Converted as converted:
        console.print(f"[yellow]![/] {converted}: the model is built in memory")
        plan = None
    if plan:
        write_weights(plan, folder, export)
        made: Any = plan
    else:
        made = save_whole(base, trained, method, export, folder, tokenizer=tokenizer, alphas=alphas)
    made.config.lineage = dict(lineage) | (getattr(made.config, "lineage", None) or {})
    save_companions(folder, base, config=made.config, generation_config=made.generation_config, tokenizer=tokenizer)
