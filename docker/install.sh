#!/bin/sh
# install.sh EXTRAS: the project with these extras (demo,serve-cpu) in .venv, at the versions of constraints.txt.
set -eu
cd "$(dirname "$0")/.."
. docker/uv.sh

if ! .venv/bin/python -c "$supported" 2>/dev/null; then
  rm -rf .venv
  "$uv" venv --quiet --python "$python" .venv
fi

offered_torch() {
  echo torch | "$uv" pip compile --quiet --no-header --no-annotate --no-deps --python .venv/bin/python \
    --constraint docker/constraints.txt "$@" - 2>/dev/null
}

set -- --editable ".[$1]" ./docker/pycosat --constraint docker/constraints.txt --override docker/overrides.txt
case $(offered_torch || true) in
  *+*) ;; # pip's own settings offer a build of torch for this machine
  *)
    if UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=1 offered_torch --torch-backend cpu >/dev/null; then
      set -- "$@" --torch-backend cpu
    elif [ "$(uname -sm)" = "Linux x86_64" ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
      echo "No CPU build of torch within reach: taking the registry's, which brings CUDA (3 GB to download)."
    fi
    ;;
esac
# Compiled now and once: otherwise every start pays for it wherever Python may not write .pyc files.
"$uv" pip install --compile-bytecode --python .venv/bin/python "$@"
