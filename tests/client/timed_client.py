"""`fedpeft-client` with other durations: `timed_client.py TIMING ARGUMENTS`, where TIMING is JSON by field of `Timing`.

For tests of what a client does after a pause, where the length of the pause is not what they show.
"""

import json
import sys
from dataclasses import replace

from fedpeft_client import timing

timing.TIMING = replace(timing.TIMING, **json.loads(sys.argv.pop(1)))  # before any module imports it by name

from fedpeft_client.__main__ import main  # noqa: E402

main()
