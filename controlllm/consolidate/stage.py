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
        from controlllm.control.tensor_files import read_header

        if not (file := trained / "trained.safetensors").exists():
            raise UserError(f"{file}: not found; run controlllm train again")
        lineage = run_lineage(base, trained)
        build_model(base, read_header(file), file, method, export, folder, lineage=lineage)

    parents = {"ingest model": base, "train": trained}
    return run_stage("consolidate", config=dict(method) | {"export": export}, parents=parents, build=build)


def build_model(
    base: Path,
    trained: Mapping[str, Any],
    place: Path,
    method: Method,
    export: ExportConfig,
    folder: Path,
    *,
    lineage: Mapping[str, Any],
) -> None:
    """Write the model that trained tensors make of the base. UserError where the two do not fit.

    trained: StoredTensors and their like by name; place: the file or folder where they are from.
    """
    from controlllm.consolidate.alphas import alphas_for
    from controlllm.consolidate.companions import load_tokenizer, save_companions
    from controlllm.consolidate.plan import plan_run
    from controlllm.consolidate.whole import needs_whole, save_whole, trained_model
    from controlllm.consolidate.writing import write_weights
    from controlllm.control.tensor_files import write
    from controlllm.progress import console
    from controlllm.train.weight_files import Converted

    tokenizer, scratch = load_tokenizer(base), folder / ".trained"

    def file() -> Path:
        """Trained tensors in one file."""
        if place.is_file() or scratch.exists():
            return place if place.is_file() else scratch
        list(write(scratch, trained))
        return scratch

    alphas = alphas_for(export, lambda: trained_model(base, file(), method), tokenizer)
    try:
        plan = None if needs_whole(method) else plan_run(base, method, trained, export, place=place, alphas=alphas)
    except Converted as converted:
        console.print(f"[yellow]![/] {converted}: the model is built in memory")
        plan = None
    if plan:
        write_weights(plan, folder, export)
        made: Any = plan
    else:
        made = save_whole(base, file(), method, export, folder, tokenizer=tokenizer, alphas=alphas)
    scratch.unlink(missing_ok=True)
    made.config.lineage = dict(lineage) | (getattr(made.config, "lineage", None) or {})
    save_companions(folder, base, config=made.config, generation_config=made.generation_config, tokenizer=tokenizer)
