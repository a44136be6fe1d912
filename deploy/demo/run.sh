#!/bin/sh
# Once: creates the demo's run, unless there is one, and watches it to its end.
set -eu
weights=$(echo /opt/demo/backbone/*.safetensors)
runs() { fedpeft run list --json | python -c 'import json, sys; [print(run["run"]) for run in json.load(sys.stdin)]'; }
if [ -z "$(runs)" ]; then
  fedpeft run create /opt/demo/run.toml --weights "$weights"
fi
fedpeft run watch "$(runs | tail -n 1)"
