# shellcheck shell=bash
# Sourced by the other scripts in this folder: provides a Python environment in .venv at the root of the
# repository. Sets ROOT and PYTHON; defines `step` and `install`.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"

# The package is installed into .venv; a folder `launch` in the current folder must not take precedence.
export PYTHONSAFEPATH=1

fail() { echo "error: $*" >&2; exit 1; }

# step <sentence> <command...>: prints the sentence, runs the command and prints how long it took. If the
# command fails, the script ends with its status.
step() {
  local what="$1" start=$SECONDS status=0
  shift
  echo "== $what"
  "$@" || status=$?
  if ((status)); then
    echo "error: this step failed after $((SECONDS - start)) s: $what" >&2
    exit "$status"
  fi
  echo "== done in $((SECONDS - start)) s"
}

find_python() {
  local name
  for name in "${MOLMO2_PYTHON:-}" python3.11 python3.12 python3.13 python3.14 python3 python; do
    if [[ -n "$name" ]] &&
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$name"
      return
    fi
  done
  fail "Python 3.11 or newer is needed and was not found;" \
    "install it, or set MOLMO2_PYTHON to its path."
}

create_venv() {
  "$1" -m venv "$VENV" ||
    fail "could not create $VENV; on Debian and Ubuntu this needs: apt install python3-venv"
}

# Hash of everything that determines what is installed.
fingerprint() {
  "$PYTHON" - "$ROOT" <<'END'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
key = (str(root), sys.version, (root / "setup.py").read_text())
print(hashlib.sha256(repr(key).encode()).hexdigest())
END
}

# install [extra]: installs the package with its dependencies, unless this was done before with the same
# setup.py. An environment with an extra also serves scripts that need none.
install() {
  local extra="${1:-}" wanted stamp python
  if command -v flock >/dev/null; then
    exec 9>"$ROOT/.venv.lock"
    flock -n 9 || { echo "== waiting for another installation to finish"; flock 9; }
  fi
  if [[ ! -x "$PYTHON" ]]; then
    python="$(find_python)"
    step "creating the environment $VENV with $("$python" --version)" create_venv "$python"
  fi
  wanted="$(fingerprint)"
  for stamp in "$VENV"/installed-*; do
    [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] || rm -f "$stamp"
  done
  if compgen -G "$VENV/installed-$extra*" >/dev/null; then
    echo "== the environment $VENV is up to date"
  else
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null ||
      fail "$VENV has no pip; remove that folder and run this again"
    # --no-compile: Python compiles modules when they are imported, a small part of the 15,000 files.
    step "installing the package and its dependencies into $VENV (takes a minute or two)" \
      "$PYTHON" -m pip install -qq --disable-pip-version-check --no-compile \
      --editable "$ROOT${extra:+[$extra]}"
    echo "$wanted" >"$VENV/installed-$extra"
  fi
  exec 9>&-
}
