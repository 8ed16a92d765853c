"""`stopping_run.py SIGNAL self|launcher train RECIPE`: the command, which sends a signal in the middle of a step."""

import os
import signal
import sys
import time

from controlllm.cli import main
from controlllm.train.stopping import StopRequest
from controlllm.train.watchdog import Watchdog

STEP = 12


def stop_in_step(number: signal.Signals, process: int) -> None:
    """Rank 0 sends the signal to this process; all ranks wait in this step until it has come to them."""
    told = []
    plain_phase, plain_note = Watchdog.phase, StopRequest._note

    def note(self, *arguments):
        told.append(arguments)
        plain_note(self, *arguments)

    def phase(self, name, step):
        plain_phase(self, name, step)
        if (name, step) == ("forward", STEP):
            if os.environ.get("RANK", "0") == "0":
                os.kill(process, number)
            while not told:
                time.sleep(0.02)

    StopRequest._note, Watchdog.phase = note, phase


if __name__ == "__main__":
    stop_in_step(signal.Signals[sys.argv[1]], os.getpid() if sys.argv[2] == "self" else os.getppid())
    sys.exit(main(sys.argv[3:]))
