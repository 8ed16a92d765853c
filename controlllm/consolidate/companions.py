"""What stands beside the weights: configuration, generation settings, tokenizer, licences, where all comes from."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlllm import __version__
from controlllm.base_facts import folder_facts
from controlllm.fingerprint import content_of
from controlllm.store import content_hash, find_lineage, read_lineage


def save_companions(folder: Path, base: Path, *, config: Any, generation_config: Any, tokenizer: Any) -> None:
    """Everything of a Hugging Face model's folder but its weights."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    made: Any = AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures = [made.__name__]
    config.save_pretrained(folder)
    if (base / "generation_config.json").exists():
        generation_config = GenerationConfig.from_pretrained(base)
    if tokenizer is not None:
        _stop_at_end_of_turn(generation_config, tokenizer)
        tokenizer.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    for file in [*base.glob("LICENSE*"), *base.glob("NOTICE*")]:
        shutil.copy2(file, folder / file.name)


def load_tokenizer(base: Path) -> Any:
    """The base's, or None where it has none."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base) if list(base.glob("tokenizer*")) else None


def _stop_at_end_of_turn(generation_config: Any, tokenizer: Any) -> None:
    """Training ends every answer with the tokenizer's EOS, or the template's own token: generation stops at both."""
    named = generation_config.eos_token_id
    stops = [*named] if isinstance(named, list) else [] if named is None else [named]
    wanted = [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    added = [token for token in dict.fromkeys(wanted) if token is not None and token not in stops]
    if added:
        stops += added
        generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an answer; None without a template, or where there is none."""
    from controlllm.data.template import ChatTemplate
    from controlllm.errors import UserError

    if not tokenizer.chat_template:
        return None
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        rendered = ChatTemplate(tokenizer).render(asked)  # type: ignore[arg-type]
    except UserError:  # such a template can be served, but not be trained with
        return None
    ids = tokenizer(rendered.text[slice(*rendered.spans[-1])], add_special_tokens=False)["input_ids"]
    return ids[-1] if ids and ids[-1] in tokenizer.added_tokens_decoder else None


def run_lineage(base: Path, trained: Path) -> dict[str, Any]:
    """Where the weights come from, inside the checkpoint itself: base model, data, training, code. No paths."""
    training = read_lineage(trained)
    facts = identity_lineage(base, training["inputs"], data=training["parents"]["prepare"]["content"])
    return facts | {"training": {"key": training["key"], "content": training["content"]}}


def identity_lineage(base: Path, inputs: Mapping[str, Any], *, data: str | None) -> dict[str, Any]:
    """inputs: of the training, by name; data: the content of what it read."""
    return base_lineage(base) | {
        "data": {"content": data, "datasets": sorted(_starting(inputs, "mix.shares."))},
        "code": {"controlllm": __version__, "train": content_of(_starting(inputs, "code "))}
        | _starting(inputs, "version of "),
    }


def base_lineage(base: Path) -> dict[str, Any]:
    return {"base_model": model_name(base), "base_content": content_hash(base), "base": folder_facts(base)}


def model_name(base: Path) -> str:
    """As the recipe names it; of a folder its own name only."""
    name = ((find_lineage(base) or {}).get("inputs") or {}).get("model.name", base.absolute().name)
    place = Path(name).expanduser()
    return place.name if "://" not in name and (place.is_absolute() or place.exists()) else name


def _starting(inputs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}
