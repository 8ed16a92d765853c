"""Which engine answers, and the base that it is compared with."""

from dataclasses import dataclass
from pathlib import Path

from controlllm import vllm_process
from controlllm.chat.engine import Engine
from controlllm.chat.loading import load_folder, load_place, tokenizer_folder
from controlllm.chat.places import Adapter, Model, Place, Trained
from controlllm.errors import UserError
from controlllm.output import find_output
from controlllm.servable import check_servable
from controlllm.tuned import has_virtual_tokens
from controlllm.whole import read_object

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class Wish:
    """How models are to be run."""

    backend: str | None = None
    """None: vLLM on a GPU where it is installed and can run the checkpoint, else transformers."""
    dtype: str | None = None


def open_engine(place: Place, wish: Wish) -> Engine:
    """UserError for a backend that does not exist or cannot run the checkpoint, before any weights are read."""
    if wish.backend not in (None, *BACKENDS):
        raise UserError(f"--backend: there is no '{wish.backend}'; there are {' and '.join(BACKENDS)}")
    why_not = _not_for_vllm(place)
    if wish.backend == "vllm" and why_not:
        raise UserError(f"--backend vllm: {why_not}")
    if wish.backend == "vllm" or (wish.backend is None and not why_not and _gpus()):
        assert isinstance(place, Model)
        return _open_vllm(place.folder, wish)
    from controlllm.chat.local import LocalEngine

    return LocalEngine(load_place(place, dtype=wish.dtype).model)


def open_base(place: Place, engine: Engine, wish: Wish, *, base: Path | None) -> Engine:
    """The engine that answers as the base: the same one where the checkpoint holds its base, else the base's own.

    base: by `--base`. UserError where it is not known or not of the same shape.
    """
    if engine.holds_base:
        return engine
    folder = base or _base_of(place)
    tuned, found = (read_object(one / "config.json") for one in (tokenizer_folder(place), folder))
    if tuned.get("vocab_size") != found.get("vocab_size"):
        raise UserError(
            f"--base {folder}: vocab_size is {found.get('vocab_size')}, but {tuned.get('vocab_size')} in "
            f"{tokenizer_folder(place)}: not its base"
        )
    from controlllm.chat.local import LocalEngine

    if isinstance(engine, LocalEngine):
        model = load_folder(folder, dtype=str(engine.model.dtype).removeprefix("torch."))
        return LocalEngine(model.to(engine.model.device))
    return _open_vllm(folder, wish)


def _base_of(place: Place) -> Path:
    """By lineage, in the store."""
    if isinstance(place, Trained | Adapter):
        return place.base
    lineage = place.config.get("lineage") or {}
    content = lineage.get("base_content")
    if content and (found := find_output("ingest model", content, near=place.folder)):
        return found
    named = f"; by its lineage that is {lineage['base_model']}" if lineage.get("base_model") else ""
    raise UserError(f"--compare: {place.folder} does not hold its base; give the base's folder with --base{named}")


def _not_for_vllm(place: Place) -> str:
    """Why vLLM cannot run it; empty where it can."""
    if not vllm_process.is_installed():
        return "vLLM is not installed; pip install 'controlllm[serve-cpu]' (with a GPU: 'controlllm[serve]')"
    if isinstance(place, Trained):
        return f"{place.folder} is a training checkpoint; consolidate it first, or leave --backend out"
    if isinstance(place, Adapter) or has_virtual_tokens(place.folder):
        return f"{place.folder} has an adapter beside its weights; use --backend transformers"
    return ""


def _gpus() -> int:
    import torch

    return min(1, torch.cuda.device_count())


def _open_vllm(folder: Path, wish: Wish) -> Engine:
    from controlllm.chat.vllm_client import VLLMEngine

    check_servable(folder)
    gpus = _gpus()
    config = read_object(folder / "config.json")
    # A stack is stored as a plain model, and vLLM has no dial for it.
    dial = config.get("control") if config.get("base_model_type") else None
    alpha = dial.get("alpha_scale", 1.0) if dial else None
    return VLLMEngine(folder, dtype=wish.dtype or ("auto" if gpus else "float32"), gpus=gpus, alpha=alpha)
