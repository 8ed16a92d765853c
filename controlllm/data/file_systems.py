"""The file systems of other machines, through fsspec.

HDFS (hdfs-native, no JVM): name services, HA and Kerberos come from core-site.xml and hdfs-site.xml in HADOOP_CONF_DIR;
credentials from the ticket cache of `kinit` or from HADOOP_USER_NAME.
WebHDFS: HADOOP_USER_NAME (or user@ in the URL), WEBHDFS_PASSWORD for a gateway, WEBHDFS_KERBEROS=1, WEBHDFS_HTTPS=1.
S3: the AWS_* variables and files, AWS_ENDPOINT_URL for another service. Google storage: default credentials.
"""

import os
from functools import cache
from typing import Any

from controlllm.errors import UserError

TIMEOUT_SECONDS = 60.0
"""Silence of a server that counts as a fault."""
# Of hdfs-native: the default waits three minutes for a name node that is down.
_HDFS_OPTIONS = {"dfs.client.failover.max.attempts": "6", "dfs.client.failover.sleep.max.millis": "2000"}
_EXTRAS = {"hdfs": "hdfs", "webhdfs": "hdfs", "s3": "s3", "gs": "gs"}


def remote_system(uri: str) -> tuple[Any, str]:
    """fsspec's file system of a URI, made anew after a fork, and the path in it."""
    kind, _, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    try:
        if kind == "hdfs":
            host, _, port = authority.partition(":")
            return _hdfs_class()(host or None, int(port) if port else None, **_HDFS_OPTIONS), slash + path
        if kind == "webhdfs":
            return _webhdfs(authority), slash + path
        return (_s3() if kind == "s3" else _gs()), f"{authority}{slash}{path}"
    except ImportError as error:
        need = f"pip install 'controlllm[{_EXTRAS[kind]}]'"
        raise UserError(f"{kind}:// needs {error.name or 'a package'}, which is not installed; {need}") from None


@cache
def library_errors(kind: str) -> tuple[type[Exception], ...]:
    """What a kind's library raises when the network or a server fails."""
    if kind == "s3":
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError
        from botocore.exceptions import ClientError as AwsError

        return (OSError, BotoCoreError, AwsError, ClientError)
    if kind == "gs":
        from aiohttp import ClientError
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError

        return (OSError, HttpError, GoogleAuthError, ClientError)
    return (OSError, RuntimeError, ValueError)


@cache
def _hdfs_class() -> type:
    from hdfs_native.fsspec import HdfsFileSystem

    class Hdfs(HdfsFileSystem):
        """Names are taken as they are: `#`, `?` and `%` mean nothing in a path."""

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.partition("://")[2].partition("/")[2] if path.startswith("hdfs://") else path or "/"

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
            reader = self.client.read(path)
            # The library ends the process's thread when asked to read past the end.
            first, last = start or 0, len(reader) if end is None else min(end, len(reader))
            return reader.read_range(first, last - first) if last > first else b""

    return Hdfs


def _webhdfs(authority: str) -> Any:
    user, _, address = authority.rpartition("@")
    if ":" in user:
        raise UserError(f"webhdfs://{address}: a password in an address ends in logs; put it into WEBHDFS_PASSWORD")
    host, _, port = address.partition(":")
    kerberos, https = (os.environ.get(f"WEBHDFS_{name}") == "1" for name in ("KERBEROS", "HTTPS"))
    if kerberos:
        import requests_kerberos  # noqa: F401  # type: ignore[import-not-found] - named here when it is missing
    user = "" if kerberos else user or os.environ.get("HADOOP_USER_NAME", "")
    password = os.environ.get("WEBHDFS_PASSWORD") if user else None
    port = int(port or (9871 if https else 9870))
    return _webhdfs_class()(host, port, kerberos=kerberos, use_https=https, user=user or None, password=password)


@cache
def _webhdfs_class() -> type:
    from fsspec.implementations.webhdfs import WebHDFS
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def send(self, *args: Any, **options: Any) -> Any:
            return super().send(*args, **options | {"timeout": TIMEOUT_SECONDS})

    class Web(WebHDFS):
        """With timeouts, names as they are, and bodies only from answers that say success."""

        def _connect(self) -> None:
            super()._connect()
            for scheme in ("http://", "https://"):
                self.session.mount(scheme, Adapter())

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.partition("://")[2].partition("/")[2] if path.startswith("webhdfs://") else path or "/"

        def ls(self, path: str, detail: bool = False, **options: Any) -> list[Any]:
            return super().ls(path, detail=detail, **options)

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
            first = start or 0
            length: dict[str, Any] = {} if end is None else {"length": end - first}
            answer = self._call("OPEN", path=path, offset=first, redirect=False, **length)
            if "Location" in answer.headers:
                answer = self.session.get(str(self._apply_proxy(answer.headers["Location"])))
                answer.raise_for_status()
            return answer.content

    return Web


def _s3() -> Any:
    from s3fs import S3FileSystem

    waits = {"connect_timeout": min(10.0, TIMEOUT_SECONDS), "read_timeout": TIMEOUT_SECONDS}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return S3FileSystem(endpoint_url=endpoint, use_listings_cache=False, config_kwargs=waits)


def _gs() -> Any:
    from gcsfs import GCSFileSystem

    return GCSFileSystem(use_listings_cache=False, endpoint_url=os.environ.get("STORAGE_EMULATOR_HOST"))
