"""Writing the tuned model tensor by tensor against loading it and `save_pretrained`: time, and memory at its peak.

python bench/consolidate.py [--hidden 1024] [--layers 16] [--dtype bfloat16] [--rounds 3] [--folder DIR]

Both make the same model of the same base and the same trained tensors (E = a quarter of the blocks) in a process of
its own; a round runs each way once, in another order. Seconds are of the work, fsync included, and not of imports;
peak is the process's largest resident memory, imports included, which `empty` has alone. Bars: 2 × the speed of load +
save_pretrained, and at most 2 GB resident.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from controlllm.config import ExportConfig, Method, ModelConfig
from controlllm.progress import prepare_environment

prepare_environment()  # of each process

PRELOADED = ["transformers.models.llama.modeling_llama", "controlllm.train.weights", "controlllm.consolidate.plan"]
WAYS = ("empty", "load + save_pretrained", "copy", "link")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", help="of the base's files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where all is written; a temporary folder when left out")
    options = parser.parse_args()
    method = {"control": {"num_expanded": max(1, options.layers // 4), "interpolation": "dlerp"}}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        apart(make, folder, options.hidden, options.layers, options.dtype, method)
        sizes = {n: sum(f.stat().st_size for f in folder.glob(f"{n}/*.safetensors")) / 1e6 for n in ("base", "run")}
        print(f"base {sizes['base']:,.0f} MB in {options.dtype}, trained {sizes['run']:,.0f} MB in float32")
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(options.rounds):
            for way in (*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]):
                found[way].append(apart(write, folder, way, method))
        report(found)


def report(found: dict[str, list[dict[str, float]]]) -> None:
    seconds = {way: statistics.median(one["seconds"] for one in those) for way, those in found.items()}
    for way, those in found.items():
        each = ", ".join(f"{one['seconds']:.2f}" for one in those)
        written, peak = those[0]["megabytes"], max(one["peak"] for one in those)
        print(f"{way:24} {seconds[way]:7.2f} s ({each})  peak {peak / 1000:.2f} GB  written {written:,.0f} MB")
    for way in ("copy", "link"):
        print(f"speed of {way} / load + save_pretrained = {seconds[WAYS[1]] / seconds[way]:.1f} (bar 2)")


def apart(function: Any, *args: Any) -> Any:
    """Its answer, from a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with context.Pool(1) as pool:
        return json.loads(pool.apply(function, args))


def make(folder: Path, hidden: int, layers: int, dtype: str, method: dict[str, Any]) -> str:
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from controlllm.train.model import load_model
    from controlllm.train.trained import trained_tensors

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, vocab_size=hidden * 16, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("cpu"):
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder / "base", max_shard_size="500MB")
    model = load_model(folder / "base", ModelConfig(name="base", attention="eager"), Method.model_validate(method))
    (folder / "run").mkdir()
    save_file({k: v.contiguous() for k, v in trained_tensors(model).items()}, folder / "run" / "trained.safetensors")
    return "{}"


def write(folder: Path, way: str, method: dict[str, Any]) -> str:
    from controlllm.consolidate.stage import build_model
    from controlllm.consolidate.whole import trained_model
    from controlllm.control.tensor_files import read_header
    from controlllm.fingerprint import sync

    chosen, trained, out = Method.model_validate(method), folder / "run" / "trained.safetensors", folder / "out"
    out.mkdir()
    began = time.perf_counter()
    if way == "load + save_pretrained":
        trained_model(folder / "base", trained, chosen).save_pretrained(out)
    elif way != "empty":
        how = ExportConfig(frozen="copy" if way == "copy" else "link")
        build_model(folder / "base", read_header(trained), trained, chosen, how, out, lineage={})
    for file in out.iterdir():
        sync(file)
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in out.glob("*.safetensors") if file.stat().st_nlink == 1) / 1e6
    shutil.rmtree(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return json.dumps({"seconds": seconds, "peak": peak, "megabytes": size})


if __name__ == "__main__":
    main()
