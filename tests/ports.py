"""Ports for servers that tests start."""

import random
import socket
from contextlib import ExitStack


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives away by itself, so that nobody takes one before it is used."""
    choices, ports = random.SystemRandom(), list[int]()
    with ExitStack() as held:
        while len(ports) < count:
            port = choices.randrange(15_000, 30_000)
            try:
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            ports.append(port)
    return ports
