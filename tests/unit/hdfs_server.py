"""A real HDFS on this machine: a NameNode and a DataNode 2.7.3, from what PyPI and Debian ship."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import pytest
from filelock import FileLock
from ports import free_ports

PYSPARK = "pyspark==2.4.8"
JARS = """
hadoop-annotations hadoop-auth hadoop-common hadoop-hdfs jetty-6 jetty-util netty- protobuf-java log4j- slf4j- guava-
commons-cli commons-codec commons-collections commons-configuration commons-io commons-lang- commons-net commons-logging
commons-httpclient commons-beanutils commons-digester commons-math3 commons-compress htrace-core httpclient- httpcore-
jackson-core-asl jackson-mapper-asl jackson-jaxrs jackson-xc javax.servlet-api leveldbjni xercesImpl xmlenc jsr305
apacheds api-asn1 api-util gson- avro-1 zookeeper curator jsp-api
"""
DEBS = """
libjersey1-core-java libjersey1-server-java libjersey1-servlet-java libjsr311-api-java libjaxb-api-java libjaxb-java
libistack-commons-java libactivation-java libcommons-daemon-java libasm-java
"""
OPENED = ("java.base/java.lang", "java.base/java.net", "java.base/sun.nio.ch", "java.base/java.nio")
KERBEROS = "java.security.jgss/sun.security.krb5"
ROLES = ("namenode.NameNode", "datanode.DataNode")


@dataclass(frozen=True)
class Hdfs:
    rpc: str
    """`hdfs://host:port`"""
    web: str
    """`webhdfs://host:port`"""


class CannotHave(Exception):
    """Something that the server is made of is not there."""


@contextmanager
def running_hdfs() -> Iterator[Hdfs]:
    """Start it, and end it; without its parts the test is skipped, or fails with CONTROLLLM_REQUIRE_HDFS=1."""
    try:
        jars = _jars()
    except (CannotHave, subprocess.SubprocessError, OSError) as error:
        reason = f"no HDFS to test with: {error}"
        if os.environ.get("CONTROLLLM_REQUIRE_HDFS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home = Path(folder)
        hdfs = _configure(home)
        command = _java(home, jars)
        _run([*command, f"org.apache.hadoop.hdfs.server.{ROLES[0]}", "-format", "-force"], cwd=home)
        for role in ROLES:
            log = stack.enter_context((home / f"{role}.log").open("w"))
            main = f"org.apache.hadoop.hdfs.server.{role}"
            daemon = subprocess.Popen([*command, main], cwd=home, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(_end, daemon)
        _wait_until_ready(hdfs, home)
        yield hdfs


def _jars() -> Path:
    """Folder of the jars, fetched once into a cache."""
    if not shutil.which("java"):
        raise CannotHave("there is no java")
    cache = Path(os.environ.get("CONTROLLLM_TEST_CACHE") or Path.home() / ".cache" / "controlllm-tests")
    jars = cache / "hadoop-2.7.3"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):  # two runs of the tests may share the cache
        if not jars.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder, "jars")
                made.mkdir()
                _fetch_pyspark(Path(folder), made)
                _fetch_debs(Path(folder), made)
                made.rename(jars)
    return jars


def _fetch_pyspark(folder: Path, jars: Path) -> None:
    # The archive's setup.py needs a pypandoc of its time, and pip runs it for the metadata.
    (folder / "constraints.txt").write_text("pypandoc<1.8\n")
    constraints = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(folder / "constraints.txt"))
    options = ["--no-deps", "--no-binary", ":all:", PYSPARK, "-d", str(folder)]
    _run([_python_with_pip(), "-m", "pip", "download", *options], env=os.environ | constraints)
    with tarfile.open(next(folder.glob("pyspark-*.tar.gz"))) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name.endswith(".jar") and name.startswith(tuple(JARS.split())):
                content = archive.extractfile(member)
                assert content is not None
                (jars / name).write_bytes(content.read())


def _python_with_pip() -> str:
    for python in (sys.executable, shutil.which("python3") or "", "/usr/bin/python3"):
        if python and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
            return python
    raise CannotHave(f"no python3 with pip, which downloads {PYSPARK}")


def _fetch_debs(folder: Path, jars: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise CannotHave("no apt-get and dpkg-deb, which give Debian's " + " ".join(DEBS.split()))
    try:
        _run(["apt-get", "download", *DEBS.split()], cwd=folder)
    except CannotHave:
        _run(["apt-get", "update"])
        _run(["apt-get", "download", *DEBS.split()], cwd=folder)
    for deb in folder.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(deb), str(folder / "debs")])
    for jar in (folder / "debs/usr/share/java").glob("*.jar"):
        if not jar.is_symlink() and not jar.name.startswith(("asm-all", "istack-commons-maven")):
            shutil.copy(jar, jars / jar.name)


def _configure(home: Path) -> Hdfs:
    rpc, web, *data = free_ports(5)
    for place in ("webapps/hdfs/WEB-INF", "webapps/datanode/WEB-INF"):
        (home / place).mkdir(parents=True)
        (home / place / "web.xml").write_text("<web-app/>")
    core = {"fs.defaultFS": f"hdfs://127.0.0.1:{rpc}", "hadoop.tmp.dir": str(home / "data")}
    places = ("dfs.datanode.address", "dfs.datanode.http.address", "dfs.datanode.ipc.address")
    hdfs = {
        "dfs.replication": "1",
        "dfs.permissions.enabled": "false",
        "dfs.webhdfs.enabled": "true",
        "dfs.namenode.http-address": f"127.0.0.1:{web}",
        "dfs.namenode.rpc-bind-host": "127.0.0.1",
        "dfs.datanode.hostname": "127.0.0.1",
        "dfs.namenode.datanode.registration.ip-hostname-check": "false",
        "dfs.namenode.safemode.extension": "0",
    } | {place: f"127.0.0.1:{port}" for place, port in zip(places, data, strict=True)}
    _write_site(home / "core-site.xml", core)
    _write_site(home / "hdfs-site.xml", hdfs)
    return Hdfs(rpc=f"hdfs://127.0.0.1:{rpc}", web=f"webhdfs://127.0.0.1:{web}")


def _write_site(file: Path, settings: dict[str, str]) -> None:
    rows = (f"<property><name>{name}</name><value>{value}</value></property>" for name, value in settings.items())
    file.write_text(f"<configuration>{''.join(rows)}</configuration>")


def _java(home: Path, jars: Path) -> list[str]:
    opened = [f"--add-opens={package}=ALL-UNNAMED" for package in (*OPENED, KERBEROS)]
    memory = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    exported = [f"--add-exports={KERBEROS}=ALL-UNNAMED", "-Djava.net.preferIPv4Stack=true"]
    return ["java", *memory, *opened, *exported, "-cp", f"{home}:{jars}/*"]


def _wait_until_ready(hdfs: Hdfs, home: Path) -> None:
    query = "/jmx?qry=Hadoop:service=NameNode,name=FSNamesystemState"
    for _ in range(600):
        try:
            with urllib.request.urlopen(hdfs.web.replace("webhdfs", "http") + query, timeout=5) as answer:
                if b'"NumLiveDataNodes" : 1' in answer.read():
                    return
        except (URLError, OSError):
            pass
        time.sleep(0.1)
    logs = "\n".join((home / f"{role}.log").read_text()[-2000:] for role in ROLES)
    raise RuntimeError(f"HDFS is not ready after a minute:\n{logs}")


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.kill()
    daemon.wait()


def _run(command: list[str], **options: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise CannotHave(f"`{' '.join(command[:3])} ...` failed: {(done.stderr or done.stdout).strip()[-300:]}")
