"""Any trainer's checkpoint as one Hugging Face directory."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from controlllm import __version__
from controlllm.appearing import appearing, refuse_present
from controlllm.config.export import ExportConfig
from controlllm.consolidate import dcp, own, peft, zero
from controlllm.consolidate.companions import (
    base_lineage,
    identity_lineage,
    load_tokenizer,
    save_companions,
)
from controlllm.consolidate.described import Description, describe
from controlllm.consolidate.stage import build_model
from controlllm.consolidate.writing import write_weights
from controlllm.control.tensor_files import Source
from controlllm.errors import UserError

KINDS = (
    "a run of controlllm or its checkpoints (step-00000010), DeepSpeed's ZeRO (*_optim_states.pt), torch's FSDP or DCP "
    "(.metadata and *.distcp), an adapter of PEFT (adapter_config.json)"
)


def export(source: Path, target: Path, *, base: Path | None = None, how: ExportConfig | None = None) -> Path:
    """Write the checkpoint `source` as a model into the new folder `target`; returns it.

    base: the folder of the base model, of which comes what the checkpoint lacks: tokenizer, settings, frozen tensors,
    and what says which model it is where no config.json lies in or beside the checkpoint. UserError, with nothing
    written, where a folder or file is missing, damaged, of another model, or may run code.
    """
    source, target = source.absolute(), target.absolute()
    _refuse(source, target, base)
    write = _writer(source, base, how or ExportConfig())
    with appearing(target) as folder:
        write(folder)
    return target


def _refuse(source: Path, target: Path, base: Path | None) -> None:
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; give {KINDS}")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target}: lies inside the checkpoint; give a folder beside it")
    if base is not None and not (base / "config.json").is_file():
        raise UserError(f"--base: {base} has no config.json; give a Hugging Face model's folder")
    refuse_present(target)


def _writer(source: Path, base: Path | None, how: ExportConfig) -> Callable[[Path], None]:
    """What writes this kind of checkpoint into a folder."""
    if run := own.find_run(source):
        return partial(_write_run, run, run.base(base), how)
    if (source / peft.CONFIG).is_file():
        return partial(peft.write_merged, source, peft.base_of(source, base), how)
    if (source / dcp.METADATA).is_file():
        return _write_named(source, "dcp", partial(dcp.read_dcp, source), base, how)
    if dcp.is_safetensors_dcp(source):
        return _write_named(source, "dcp", partial(dcp.read_safetensors_dcp, source), base, how)
    if step := zero.step_folder(source):
        return _write_named(step, "deepspeed", lambda _wanted: zero.read_zero(step), base, how)
    if list(source.glob("*.distcp")):
        raise UserError(f"{source / dcp.METADATA}: not found beside *.distcp: half a checkpoint; copy all of it")
    if (source / "config.json").is_file() and list(source.glob("*.safetensors")):
        raise UserError(f"{source}: is a Hugging Face model already; controlllm fold makes a plain one of it")
    raise UserError(f"{source}: is no checkpoint that is known here; give {KINDS}")


def _write_run(run: own.Run, base: Path, how: ExportConfig, folder: Path) -> None:
    data = run.inputs.get("output of prepare")
    lineage = identity_lineage(base, run.inputs, data=data) | {"training": run.facts}
    build_model(base, run.tensors, run.place, run.method, how, folder, lineage=lineage)


def _write_named(
    source: Path, kind: str, read: Callable[[Callable[[str], bool]], Mapping[str, Source]], base: Path | None,
    how: ExportConfig,
) -> Callable[[Path], None]:  # fmt: skip
    """Of a checkpoint that names its tensors, and nothing else; all is read and verified here but the numbers."""
    found = read(lambda name: not name.startswith(("optim", "optimizer")))
    described = describe(source, found, base)
    plan = described.plan(how)

    def write(folder: Path) -> None:
        write_weights(plan, folder, how)
        plan.config.lineage = _lineage(source, kind, described) | (getattr(plan.config, "lineage", None) or {})
        beside = described.base or described.place
        save_companions(
            folder, beside, config=plan.config, generation_config=plan.generation_config,
            tokenizer=load_tokenizer(described.place) or load_tokenizer(beside),
        )  # fmt: skip

    return write


def _lineage(source: Path, kind: str, described: Description) -> dict[str, Any]:
    known = base_lineage(described.base) if described.base else {}
    return known | {"training": {"checkpoint": source.name, "kind": kind}, "code": {"controlllm": __version__}}
