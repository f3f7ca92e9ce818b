# shellcheck shell=bash
# What the stages of CI and the campaigns share; they source it from the root of a checkout.
set -euo pipefail
say() { printf '\n== %s\n' "$*"; }

# need PACKAGE...: installs Debian packages, if this user may; one stage at a time.
need() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s "$@" >/dev/null 2>&1; then
    (
      flock 9
      apt-get update -qq >/dev/null
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    ) 9>/tmp/fusedopt-packages
  fi
}

# environment FOLDER [PYTHON]: makes a fresh virtual environment in a folder, and activates it.
environment() {
  "${2:-$(interpreter 3.11)}" -m venv "$1"
  # shellcheck disable=SC1091
  . "$1/bin/activate"
}

# interpreter VERSION: prints the path of that CPython, on PATH or of pyenv; nothing if there is none.
interpreter() {
  local python
  for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python /usr/bin/python3; do
    if [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
      command -v "$python"
      return
    fi
  done
}

# install ARGUMENT...: pip install, quietly unless it fails.
install() {
  pip install -q "$@" 2>&1 | { grep -v 'WARNING: Location' || true; }
}

# at_once FUNCTION...: calls functions side by side, in the background, where a shell ignores SIGINT. Prints what
# each has printed when it has ended, in this order, and fails if one has failed.
at_once() {
  local name status=0 logs
  logs=$(mktemp -d)
  declare -A processes
  for name in "$@"; do
    "$name" >"$logs/$name" 2>&1 &
    processes[$name]=$!
  done
  for name in "$@"; do
    wait "${processes[$name]}" || status=1
    cat "$logs/$name"
  done
  rm -rf "$logs"
  return $status
}

# prefix of commands with sanitizers, whose runtimes need a range of addresses that randomisation may give to
# something else
fixed=() && setarch -R true 2>/dev/null && fixed=(setarch -R)

# fuzz_by_coverage FOLDER SECONDS: builds and runs preset libfuzzer in a folder; its report is FOLDER/covered.
fuzz_by_coverage() {
  cmake --preset libfuzzer -B "$1/libfuzzer" >/dev/null
  cmake --build "$1/libfuzzer" -j2 >/dev/null
  mkdir "$1/corpus"
  "${fixed[@]}" "$1/libfuzzer/tests/native/libfuzzer" "$1/corpus" -max_total_time="$2" -max_len=512 \
    -print_final_stats=1 2>"$1/covered" || { tail -50 "$1/covered" && return 1; }
}
