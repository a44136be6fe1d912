#!/bin/sh
# Once: creates the demo's run, unless there is one, and watches it to its end.
set -eu
weights=$(echo /opt/demo/backbone/*.safetensors)
# A list that fails is no list without runs: the status of a pipe is that of its last command alone.
newest() {
  listed=$(fedpeft run list --json) || return
  printf '%s' "$listed" | python -c 'import json, sys; print(*[run["run"] for run in json.load(sys.stdin)][-1:])'
}
run=$(newest)
if [ -z "$run" ]; then
  fedpeft run create /opt/demo/run.toml --weights "$weights"
  run=$(newest)
fi
fedpeft run watch "$run"
