"""`fedpeft-server`: the daemon. Exit codes: 0 stopped by a signal, 1 failed, 2 wrong settings."""

from __future__ import annotations

import asyncio
import sys

from fedpeft.errors import FedpeftError, SettingsInvalid, StateInvalid
from fedpeft.logs import configure, silence_grpc
from fedpeft_server.settings import Settings


def main() -> None:
    """Runs the daemon until SIGTERM or SIGINT."""
    try:
        settings = Settings.read(sys.argv[1:])
        configure(settings.log_format, settings.log_level)
        silence_grpc()
        from fedpeft_server.app import Server  # only now: gRPC looks at the environment when it is imported

        asyncio.run(Server(settings).run())
    except (SettingsInvalid, StateInvalid) as error:
        sys.exit(_fail(error, 2))
    except FedpeftError as error:
        sys.exit(_fail(error, 1))


def _fail(error: FedpeftError, code: int) -> int:
    print(f"fedpeft-server: {error.message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
