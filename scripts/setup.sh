#!/usr/bin/env bash
# Make .venv with everything the programs and their tests need. Does nothing when it is up to date.
# PYTHON chooses the interpreter (3.10 or newer); default: python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

stamp=.venv/pyproject.sha256
wanted=$(sha256sum <pyproject.toml)
if [ "$wanted" = "$(cat "$stamp" 2>/dev/null)" ]; then
  exit 0
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "setup: $("$python" --version 2>&1) is too old; set PYTHON to a Python 3.10 or newer" >&2
  exit 2
}
echo "setup: installing into .venv (PyTorch's GPU build is several GB; INSTALL.md tells how to take the CPU build)"
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
echo "$wanted" >"$stamp"
