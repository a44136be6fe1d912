"""A NVFlare client: adds one to what comes; `client.py SECONDS`, which it takes for that."""

import sys
import time

import nvflare.client as flare

flare.init()
while flare.is_running():
    got = flare.receive()
    if got is None:
        break
    time.sleep(float(sys.argv[1]))
    key = next(iter(got.params))
    flare.send(flare.FLModel(params={key: got.params[key] + 1}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
