"""What can be known of a checkpoint before an engine is started on it, so that its mistake is one line and no log."""

import difflib
from pathlib import Path
from typing import Any

from controlllm.errors import UserError
from controlllm.tuned import has_virtual_tokens
from controlllm.whole import check_whole, read_object


def check_servable(checkpoint: Path) -> None:
    """UserError where no engine could serve this folder: what is missing, or does not fit together."""
    if not checkpoint.is_dir():
        said = (
            "is a file; give the checkpoint's folder" if checkpoint.exists() else f"no such folder{_near(checkpoint)}"
        )
        raise UserError(f"{checkpoint}: {said}")
    files = {path.name: path for path in checkpoint.iterdir() if path.is_file()}
    if "config.json" not in files and (checkpoint / "model" / "config.json").is_file():
        raise UserError(f"{checkpoint}: is a run's folder; give {checkpoint / 'model'}")
    shapes = check_whole(checkpoint, files)
    if has_virtual_tokens(checkpoint):
        raise UserError(f"{checkpoint}: has virtual tokens, which vLLM has no place for")
    config = read_object(checkpoint / "config.json")
    if not config.get("architectures"):
        raise UserError(f"{checkpoint / 'config.json'}: names no architectures; save the model again")
    _check_vocabulary(checkpoint, config.get("text_config", config).get("vocab_size"), shapes)


def _check_vocabulary(checkpoint: Path, words: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """The tokenizer's, the configuration's and the embeddings'; embeddings may have rows to spare."""
    for name, shape in shapes.items():
        if name.endswith("embed_tokens.weight") and isinstance(words, int) and shape[0] < words:
            raise UserError(
                f"{checkpoint / 'config.json'}: vocab_size is {words}, but {name} has {shape[0]} rows; is it another "
                "model's config.json?"
            )
    file = checkpoint / "tokenizer.json"
    if not (isinstance(words, int) and file.is_file()):
        return
    last = max(_ids(read_object(file)), default=0)
    if last >= words:
        raise UserError(
            f"{file}: has token {last}, but the model has only {words} (vocab_size); is it another model's tokenizer?"
        )


def _ids(tokenizer: dict[str, Any]) -> list[int]:
    """Of all tokens: a list of them (unigram), or a map to their ids, and those that were added."""
    words = (tokenizer.get("model") or {}).get("vocab") or {}
    known = [len(words) - 1] if isinstance(words, list) else list(words.values())
    return [*known, *(token["id"] for token in tokenizer.get("added_tokens") or [])]


def _near(folder: Path) -> str:
    """What it may have been meant to be."""
    if not folder.parent.is_dir():
        return ""
    names = [other.name for other in folder.parent.iterdir() if other.is_dir()]
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f"; did you mean {folder.parent / near[0]}?" if near else ""
