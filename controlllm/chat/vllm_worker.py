"""A vLLM engine that writes one answer at a time: `python -m controlllm.chat.vllm_worker SETTINGS`.

Lines of JSON come on stdin and go to stdout; what libraries print goes to the log.
"""

import json
import os
import queue
import signal
import sys
import threading
from functools import partial
from typing import Any, TextIO

Line = dict[str, Any]
FIT = -1
"""For vLLM: as long a context as the model and the memory allow."""


def main(settings: str) -> None:
    """Serve until the caller is gone."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    inbox: queue.Queue[Line] = queue.Queue()
    threading.Thread(target=_read, args=(inbox,), daemon=True).start()
    asked = json.loads(settings)
    from vllm import __version__

    from controlllm.vllm_engine import open_llm

    llm = open_llm(asked["model"], dtype=asked["dtype"], longest=FIT, gpus=asked["gpus"], skip_tokenizer_init=True)
    kind = llm.apply_model(lambda model: type(model).__name__)[0]
    found = llm.llm_engine.model_config
    dtype = str(found.dtype).removeprefix("torch.")
    _tell(told, {"version": __version__, "class": kind, "context": found.max_model_len, "dtype": dtype})
    _serve(llm, inbox, told, alpha=asked["alpha"])


def _serve(llm: Any, inbox: "queue.Queue[Line]", told: TextIO, *, alpha: float | None) -> None:
    """alpha: where the checkpoint's dial stands."""
    while True:
        line = inbox.get()
        if "stop" in line:  # of an answer that was at its end already
            continue
        if line["alpha"] != alpha:
            _turn(llm, line["alpha"])
            alpha = line["alpha"]
        _answer(llm.llm_engine, line, inbox, told)


def _turn(llm: Any, alpha: float) -> None:
    """The dial; keys and values of the model that was before are forgotten."""
    from controlllm.vllm_plugin import set_alpha_scale

    llm.apply_model(partial(set_alpha_scale, scale=alpha))
    llm.reset_prefix_cache()


def _answer(engine: Any, line: Line, inbox: "queue.Queue[Line]", told: TextIO) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    name, stop = str(line["id"]), line["stop_tokens"]
    parameters = SamplingParams(
        temperature=line["temperature"], top_p=line["top_p"], seed=line["seed"], max_tokens=line["room"],
        stop_token_ids=stop, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    engine.add_request(name, {"prompt_token_ids": line["ids"]}, parameters)
    while engine.has_unfinished_requests():
        if not inbox.empty() and inbox.queue[0].get("stop") == line["id"]:
            inbox.get()
            engine.abort_request([name])
        for output in engine.step():
            made = [token for token in output.outputs[0].token_ids if token not in stop]
            _tell(told, {"id": line["id"], "tokens": made, "reused": output.num_cached_tokens or 0})
    _tell(told, {"id": line["id"], "end": True})


def _tell(told: TextIO, line: Line) -> None:
    told.write(json.dumps(line) + "\n")
    told.flush()


def _read(inbox: "queue.Queue[Line]") -> None:
    """The caller holds stdin open for as long as it lives."""
    for line in sys.stdin:
        inbox.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
