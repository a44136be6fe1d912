"""Asynchronous work for callers that are not asynchronous, and Ctrl-C in the middle of it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, os, signal
from fedpeft.api import blocking as background

async def source():
    try:
        yield "first"
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGINT)
        await asyncio.sleep(30)
    finally:
        await asyncio.sleep(0.05)
        print("closed", flush=True)

try:
    for each in background.stream(source()):
        print(each, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(background.do(asyncio.sleep(0, "goes on")), flush=True)
"""


def test_ctrl_c_ends_a_stream_after_its_work_has_ended_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n") == ["first", "closed", "interrupted", "goes on", ""], done.stderr
    assert done.stderr == ""


AT_ONCE = """
import asyncio, threading, time
from fedpeft.api import blocking

made, new = [], asyncio.new_event_loop
def slowly():
    time.sleep(0.2)
    made.append(new())
    return made[-1]
asyncio.new_event_loop = slowly
async def here():
    return asyncio.get_running_loop()
loops = []
threads = [threading.Thread(target=lambda: loops.append(blocking.do(here()))) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(made), len(set(map(id, loops))), len(loops))
"""


def test_the_first_calls_of_several_threads_share_one_loop() -> None:
    done = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "1", "8"], done.stdout + done.stderr
