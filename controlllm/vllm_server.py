"""vLLM's OpenAI server: `python -m controlllm.vllm_server [--attached] MODEL ARGUMENTS`, with vLLM's own arguments.

Attached, it imports, waits for a line on stdin before it opens the engine, and ends with whoever holds stdin open.
"""

import os
import signal
import sys
import threading

ATTACHED = "--attached"


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM or SIGINT, or until the caller is gone."""
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    from controlllm.vllm_engine import look_at_the_model_class_here
    from controlllm.vllm_plugin import register

    register()
    if arguments[0] == ATTACHED:
        os.read(0, 1)
        threading.Thread(target=die_with_the_caller, daemon=True).start()
        arguments = arguments[1:]
    look_at_the_model_class_here(arguments[0])
    sys.argv[1:] = ["--model", *arguments]
    serve()


def die_with_the_caller() -> None:
    """The caller holds stdin open for as long as it lives, and says nothing more."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
elif __name__ == "__mp_main__":  # a process of the engine, where this package may be on the path but not installed
    from controlllm.vllm_plugin import register

    register()
