"""What is served and how: the arguments of vLLM's server, and what can be wrong with them."""

import errno
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlllm import vllm_process
from controlllm.errors import UserError
from controlllm.servable import check_servable
from controlllm.vllm_engine import ENVIRONMENT, defaults
from controlllm.whole import read_object


@dataclass(frozen=True)
class Serving:
    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str | None = None
    max_model_len: int | None = None
    tensor_parallel: int = 1
    alpha: float | None = None
    """The dial: 0 is the base model, 1 the trained one."""
    extra: Sequence[str] = field(default_factory=tuple)
    """Arguments of vLLM's own, after ours."""

    @property
    def name(self) -> str:
        """The folder's; of a run's link `model` the run's."""
        place = self.checkpoint.absolute()
        return place.parent.name if place.name in ("model", "refused") else place.name


def check(serving: Serving) -> None:
    """UserError for what can be known to be wrong before the engine starts."""
    if not vllm_process.is_installed():
        raise UserError(
            "serve: vLLM is not installed; pip install 'controlllm[serve-cpu]' (with a GPU: 'controlllm[serve]'), or "
            f"name a Python that has it in {vllm_process.PYTHON}"
        )
    check_servable(serving.checkpoint)
    if serving.alpha is not None:
        _control(serving)
    _check_port(serving.host, serving.port)


def command(serving: Serving, *, attached: bool = False) -> list[str]:
    """What is run, in `environment()`. attached: as `vllm_server` says."""
    given: dict[str, Any] = {"host": serving.host, "port": serving.port, "served-model-name": serving.name}
    given |= {name.replace("_", "-"): value for name, value in defaults(_gpus(serving)).items()}
    given |= {"dtype": serving.dtype or _dtype(serving), "max-model-len": serving.max_model_len}
    if serving.alpha is not None:
        given["hf-overrides"] = json.dumps({"control": _control(serving) | {"alpha_scale": serving.alpha}})
    own = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    eager = [] if _on_gpu() else ["--enforce-eager"]
    return [
        *(vllm_process.python(), "-m", "controlllm.vllm_server", *(["--attached"] if attached else [])),
        str(serving.checkpoint),
        *(*own, *eager, *serving.extra),
    ]


def environment() -> dict[str, str]:
    """Ours, where the person has not said otherwise; the server's log is as vLLM has it."""
    return {
        name: value
        for name, value in ENVIRONMENT.items()
        if os.environ.get(name, value) == value and name != "VLLM_LOGGING_LEVEL"
    }


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpus(serving: Serving) -> int:
    return serving.tensor_parallel if _on_gpu() else 0


def _dtype(serving: Serving) -> str | None:
    """On a CPU the checkpoint's own, which vLLM would make bfloat16; on GPUs vLLM's choice."""
    if _on_gpu():
        return None
    config = read_object(serving.checkpoint / "config.json")
    return config.get("dtype") or config.get("torch_dtype")


def _control(serving: Serving) -> dict[str, Any]:
    control = read_object(serving.checkpoint / "config.json").get("control")
    if not isinstance(control, dict) or control.get("layout") == "stack":
        raise UserError(f"--alpha {serving.alpha:g}: {serving.checkpoint} has no twins to turn down; leave it out")
    return control


def _check_port(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: is taken on {host}; choose another, or stop what uses it") from None
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port}: needs rights that you have not; choose one above 1023") from None
        raise UserError(f"--host {host}: cannot be listened on ({error.strerror}); give an address here") from None


def url(serving: Serving) -> str:
    """As this machine reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(serving.host, serving.host)  # noqa: S104 - not bound, asked
    scheme = "https" if any(text.startswith("--ssl-certfile") for text in serving.extra) else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{serving.port}"


def greeting(serving: Serving) -> str:
    """Where it is, and how it is asked."""
    config = serving.checkpoint / "tokenizer_config.json"
    chats = (serving.checkpoint / "chat_template.jinja").is_file() or (
        config.is_file() and "chat_template" in read_object(config)
    )
    path, asked = ("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]})
    if not chats:
        path, asked = "completions", {"prompt": "Hello", "max_tokens": 32}
    body = json.dumps({"model": serving.name} | asked)
    place = f"{url(serving)}/v1"
    return (
        f"ready: {place} serves {serving.name}; Ctrl-C ends it\n"
        f"  curl {place}/{path} -H 'Content-Type: application/json' -d '{body}'"
    )
