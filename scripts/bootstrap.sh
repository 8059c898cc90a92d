#!/usr/bin/env bash
# Makes .venv with everything that FlexLLM and its tests need.
# PYTHON=... chooses the interpreter (3.11 to 3.14), TORCH=... another torch (triton 3.7.1
# belongs to torch 2.13). Where the interpreter already has
# a torch built for CUDA, that one is used and none is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

runs() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; }
has_cuda_torch() { "$1" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' >/dev/null 2>&1; }

python=
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
  if runs "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "FlexLLM needs Python 3.11 to 3.14; set PYTHON=/path/to/python" >&2
  exit 1
fi

flags=()
if has_cuda_torch "$python"; then
  echo "using the CUDA torch of $python"
  flags=(--system-site-packages)
fi
if [ ! -x .venv/bin/python ] && ! "$python" -m venv "${flags[@]}" .venv; then
  rm -rf .venv
  echo "$python cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
  exit 1
fi

pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt)
if ! has_cuda_torch .venv/bin/python; then
  echo "installing torch"
  "${pip[@]}" "${TORCH:-torch==2.13.0}" "triton==3.7.1; platform_system == 'Linux'"
fi
echo "installing FlexLLM with its development tools"
"${pip[@]}" --editable '.[dev]'
touch .venv/.flexllm-installed
