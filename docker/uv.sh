# shellcheck shell=sh
# Sourced by install.sh and lock.sh from the repository's root. Sets $python (3.11 or 3.12) and $uv, and tells uv what
# pip was told: uv does not read pip's configuration, and a mirror, a certificate or a CPU build of torch may stand there.

fail() {
  echo "$*" >&2
  exit 1
}

supported='import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
  else
    set -- python3 python3.12 python3.11 python
  fi
  for candidate; do
    if "$candidate" -c "$supported" 2>/dev/null; then
      python=$("$candidate" -c 'import sys; print(sys.executable)')
      return
    fi
  done
  fail "Python 3.11 or 3.12 is needed, and none of these is it: $*. Install one (apt-get install python3.11) or name it: make PYTHON=/path/to/python3.11"
}

find_uv() {
  if command -v uv >/dev/null; then
    uv=uv
    return
  fi
  uv=.venv-uv/bin/uv
  [ -x "$uv" ] && return
  echo "Fetching uv, the installer, into .venv-uv"
  # --target is allowed where the system's own Python must not be changed (PEP 668).
  if "$python" -m pip --version >/dev/null 2>&1; then
    PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 "$python" -m pip install -qq --target .venv-uv "uv==$UV_VERSION" ||
      fail "pip could not fetch uv==$UV_VERSION (its message stands above)."
  elif "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv .venv-uv
    .venv-uv/bin/pip install -qq "uv==$UV_VERSION" ||
      fail "pip could not fetch uv==$UV_VERSION (its message stands above)."
  else
    fail "$python has neither pip nor ensurepip: apt-get install python3-venv (or put uv on the PATH), then run make again."
  fi
}

pip_setting() {
  "$python" -m pip config get "global.$1" 2>/dev/null || .venv-uv/bin/pip config get "global.$1" 2>/dev/null || true
}

tell_uv() {
  if [ -z "${UV_FIND_LINKS:-}" ]; then
    for link in ${PIP_FIND_LINKS:-$(pip_setting find-links)}; do
      case ${link#file://} in
        *://*) ;;
        *) [ -e "${link#file://}" ] || continue ;; # pip only warns of a missing folder, uv stops
      esac
      UV_FIND_LINKS=${UV_FIND_LINKS:+$UV_FIND_LINKS,}$link
    done
    [ -z "${UV_FIND_LINKS:-}" ] || export UV_FIND_LINKS
  fi
  if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    UV_DEFAULT_INDEX=${PIP_INDEX_URL:-$(pip_setting index-url)}
    if [ -n "$UV_DEFAULT_INDEX" ]; then export UV_DEFAULT_INDEX; else unset UV_DEFAULT_INDEX; fi
  fi
  for bundle in "${SSL_CERT_FILE:-}" "${PIP_CERT:-}" "$(pip_setting cert)" /etc/ssl/certs/ca-certificates.crt; do
    [ -f "$bundle" ] || continue
    export SSL_CERT_FILE="$bundle"
    break
  done
  export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"
}

UV_VERSION=0.13.9
find_python
find_uv
tell_uv
