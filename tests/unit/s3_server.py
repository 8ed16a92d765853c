"""A real S3 server for tests, and a bucket in it that the environment points to."""

from collections.abc import Iterator
from contextlib import contextmanager

from controlllm.data.location import file_system


@contextmanager
def running_s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def make_bucket(server: str, monkeypatch, tmp_path) -> str:
    """Its name, that of the test's own folder."""
    settings = {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "someone", "SECRET_ACCESS_KEY": "hush"}
    settings |= {"DEFAULT_REGION": "us-east-1", "CONFIG_FILE": str(tmp_path / "none")}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = tmp_path.name.replace("_", "-").lower()
    file_system(f"s3://{bucket}/x")[0].mkdir(bucket)
    return bucket
