"""Stage 4: base and trained tensors to one Hugging Face directory."""

import shutil
from pathlib import Path

from controlllm.config import ControlConfig
from controlllm.store import Output, content_hash, read_lineage, run_stage


def consolidate(base: Path, trained: Path, control: ControlConfig | None) -> Output:
    """Everything `AutoModelForCausalLM.from_pretrained` needs (after `import controlllm`), and nothing elsewhere."""

    def build(folder: Path) -> None:
        from transformers import AutoTokenizer, GenerationConfig

        from controlllm.config import ModelConfig
        from controlllm.train.checkpoint import load_trained
        from controlllm.train.model import load_model

        model = load_model(base, ModelConfig(name=str(base)), control)
        load_trained(trained / "trained.safetensors", model)
        model.config.use_cache = True
        model.config.lineage = _lineage(base, trained)
        model.eval().save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        if (base / "generation_config.json").exists():
            GenerationConfig.from_pretrained(base).save_pretrained(folder)
        _copy_licences(base, folder)

    parents = {"ingest model": base, "train": trained}
    return run_stage("consolidate", config={"control": control}, parents=parents, build=build)


def _lineage(base: Path, trained: Path) -> dict[str, str]:
    """Where the weights come from, inside the checkpoint itself."""
    lineage = read_lineage(trained)
    data = {f"output_of_{name}": parent["content"] for name, parent in lineage["parents"].items()}
    return {
        "base_content": content_hash(base),
        "trained_content": lineage["content"],
        "train_key": lineage["key"],
    } | data


def _copy_licences(base: Path, folder: Path) -> None:
    for file in [*base.glob("LICENSE*"), *base.glob("NOTICE*")]:
        shutil.copy2(file, folder / file.name)
