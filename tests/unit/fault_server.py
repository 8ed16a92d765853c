"""A server of one file that speaks enough WebHDFS to be read, and misbehaves on demand."""

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PATH = '/data/it\'s "one" file.jsonl'


@dataclass
class Faulty:
    """What is served, and the faults of the next reads, the first first; `always` is that of all after them."""

    content: bytes
    port: int = 0
    faults: list[str] = field(default_factory=list)
    always: str | None = None
    reads: int = 0
    end: threading.Event = field(default_factory=threading.Event)

    @property
    def uri(self) -> str:
        return f"webhdfs://someone@127.0.0.1:{self.port}{PATH}"


@contextmanager
def faulty_server(content: bytes) -> Iterator[Faulty]:
    served = Faulty(content)
    handler = type("Handler", (_Handler,), {"served": served})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        served.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield served
        finally:
            served.end.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Faulty

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        if path == f"/datanode{PATH}":
            self._read(query)
        elif path != f"/webhdfs/v1{PATH}":
            self._answer(404, {"RemoteException": {"exception": "FileNotFoundException", "message": "none"}})
        elif query["op"] == "OPEN":
            self.send_response(307)
            there = self.path.replace("/webhdfs/v1", "/datanode")
            self.send_header("Location", f"http://127.0.0.1:{self.served.port}{there}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            status = {"length": len(self.served.content), "modificationTime": 7, "type": "FILE", "pathSuffix": ""}
            self._answer(200, {"FileStatus": status})

    def _read(self, query: dict[str, str]) -> None:
        served = self.served
        served.reads += 1
        fault = served.faults.pop(0) if served.faults else served.always
        start = int(query["offset"])
        body = served.content[start : start + int(query["length"])]
        if fault == "500":
            self._answer(500, {"RemoteException": {"exception": "IOException", "message": "disk"}})
        elif fault == "403":
            self._answer(403, {"RemoteException": {"exception": "AccessControlException", "message": "not yours"}})
        elif fault == "hang":
            served.end.wait()
        elif fault == "reset":
            self._send(body[: len(body) // 2], len(body))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "cut":
            self._send(body[: len(body) // 2], len(body))
        elif fault == "short":
            self._send(body[:-1], len(body) - 1)
        elif fault == "long":
            self._send(body + b"x", len(body) + 1)
        else:
            self._send(body, len(body))

    def _answer(self, status: int, data: dict[str, Any]) -> None:
        self._send(json.dumps(data).encode(), None, status)

    def _send(self, body: bytes, length: int | None, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        self.close_connection = True
