#!/usr/bin/env bash
# The core tests on the oldest torch that Lexmill allows, where pip has a build of it that brings no CUDA packages.
set -euo pipefail
cd "$(dirname "$0")/.."
version=2.11.0
python=${PYTHON:-python3}
plan=$(.venv/bin/python -m pip install --dry-run --ignore-installed --quiet --report - "torch==$version" 2>/dev/null) || {
  echo "torch $version: not offered here; the core tests ran on $(.venv/bin/python -c 'import torch; print(torch.__version__)') only"
  exit 0
}
if grep -qE '"name": "(nvidia|cuda)[-_]' <<<"$plan"; then
  echo "torch $version: its build here brings CUDA packages; skipped"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
grep -v '^torch==' constraints.txt >"$folder/constraints.txt"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c "$folder/constraints.txt" \
  "torch==$version" --editable '.[serve,report,starter]' beartype httpx hypothesis pytest pytest-timeout scikit-learn transformers
"$folder/bin/python" -m pytest -p no:cacheprovider tests/config tests/artifact tests/data tests/metrics tests/nn tests/models \
  tests/tasks tests/train
