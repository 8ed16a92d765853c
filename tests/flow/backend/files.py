"""Where clients put files: signed URLs over http, and the data proxy that hands them out."""

import hashlib
import http.server
import threading
from pathlib import Path
from typing import Any

from flyteidl.service import dataproxy_pb2, dataproxy_pb2_grpc


class Files:
    """An http server on loopback that keeps what is PUT in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                file = folder / self.path.partition("?")[0].lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """A test has no use for it."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class DataProxy(dataproxy_pb2_grpc.DataProxyServiceServicer):
    def __init__(self, files: Files):
        self.files = files

    def CreateUploadLocation(self, request: Any, context: Any) -> Any:
        root = request.filename_root or hashlib.md5(request.content_md5).hexdigest()
        place = f"{request.project}/{request.domain}/{root}/{request.filename}"
        return dataproxy_pb2.CreateUploadLocationResponse(
            signed_url=f"{self.files.url}/{place}?signature=test", native_url=f"file://{self.files.folder / place}"
        )
