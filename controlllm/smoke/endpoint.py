"""The OpenAI endpoint, asked once through the `openai` client: what an application would see."""

import importlib.util
from typing import Any

from controlllm.errors import UserError
from controlllm.smoke.greedy import Greedy
from controlllm.smoke.prompts import Prompt
from controlllm.smoke.server import GREEDY, HOST, NAME, Server

# What is no field of OpenAI's goes beside them.
_BESIDE = {name: value for name, value in GREEDY.items() if name in ("top_k", "min_p", "repetition_penalty")}
_FIELDS = {name: value for name, value in GREEDY.items() if name not in _BESIDE}


def check_client() -> None:
    """UserError where the client is not installed; it comes with vLLM."""
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            "smoke.endpoint: the openai client is not installed here; pip install openai, or set smoke.endpoint=false"
        )


def ask(
    server: Server, prompt: Prompt, expected: Greedy, *, text: str, max_new_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """What was answered, and what of it is wrong. expected, and its text: of the same server, asked in tokens.

    A message is asked as a chat; a prompt of a model without a chat template as a text to go on with.
    """
    import httpx2
    import openai

    with server.client() as http:
        client = openai.OpenAI(base_url=f"{HOST}/v1", api_key="none", http_client=http, max_retries=0)
        try:
            names = [model.id for model in client.models.list()]
            whole, streamed = (_ask(client, prompt, max_new_tokens, stream=stream) for stream in (False, True))
        except openai.APITimeoutError:
            server.late("gave no answer to the openai client")
        except (openai.APIError, httpx2.HTTPError) as error:
            return {"error": str(error)[:300]}, [f"the openai client is refused: {str(error)[:300]}"]
    said = {name: whole[name] for name in ("text", "finish", "usage")}
    facts = {"models": names, "asked": "chat" if prompt.message else "completion", **said}
    wrong = ["its answer is empty"] if text.strip() and not whole["text"].strip() else []
    return facts, [*wrong, *_wrong(names, whole, streamed, prompt, expected)]


def _ask(client: Any, prompt: Prompt, max_new_tokens: int, *, stream: bool) -> dict[str, Any]:
    given = {"model": NAME, "max_tokens": max_new_tokens, "extra_body": _BESIDE | {"return_token_ids": True}, **_FIELDS}
    given |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    if prompt.message:
        made = client.chat.completions.create(messages=[{"role": "user", "content": prompt.text}], **given)
    else:
        made = client.completions.create(prompt=prompt.tokens, **given)
    return _gathered(list(made) if stream else [made])


def _gathered(parts: list[Any]) -> dict[str, Any]:
    """One answer of all its parts, which is one part where it was not streamed."""
    text, tokens, finish, usage, asked = "", [], None, None, None
    for part in parts:
        usage = part.usage or usage
        asked = asked or (part.model_extra or {}).get("prompt_token_ids")
        for choice in part.choices:
            said = getattr(choice, "message", None) or getattr(choice, "delta", None)
            text += (said.content or "") if said else choice.text
            extra = choice.model_extra or {}
            asked = asked or extra.get("prompt_token_ids")
            tokens += extra.get("token_ids") or []
            finish = choice.finish_reason or finish
    counted = {"prompt": usage.prompt_tokens, "answer": usage.completion_tokens} if usage else None
    return {"text": text, "tokens": tokens, "prompt_tokens": asked, "finish": finish, "usage": counted}


def _wrong(names: list[str], whole: dict[str, Any], streamed: dict[str, Any], prompt: Prompt, expected: Greedy) -> Any:
    if names != [NAME]:
        yield f"it names the models {names}, not {NAME}"
    if whole["finish"] != expected.finish:
        yield f"finish_reason is {whole['finish']}, not {expected.finish}"
    if whole["tokens"] != expected.tokens:
        yield "its greedy tokens are not those of the same engine asked in tokens"
    if whole["usage"] != {"prompt": len(prompt.tokens), "answer": len(expected.tokens)}:
        yield f"usage is {whole['usage']}, not {len(prompt.tokens)} and {len(expected.tokens)} tokens"
    if prompt.message and whole["prompt_tokens"] != prompt.tokens:
        yield "it makes other tokens of the conversation than the tokenizer's chat template"
    for name in ("text", "tokens", "finish", "usage"):
        if streamed[name] != whole[name]:
            yield f"streamed, its {name} differs: {streamed[name]!r}, not {whole[name]!r}"
