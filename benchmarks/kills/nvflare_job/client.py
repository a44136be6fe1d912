"""A NVFlare client: adds one to what comes, in a second."""

import time

import nvflare.client as flare

flare.init()
while flare.is_running():
    got = flare.receive()
    if got is None:
        break
    time.sleep(1)
    key = next(iter(got.params))
    flare.send(flare.FLModel(params={key: got.params[key] + 1}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
