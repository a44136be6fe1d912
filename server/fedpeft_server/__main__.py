"""`fedpeft-server`: the daemon. Exit codes: 0 stopped by a signal, 1 failed, 2 wrong settings."""

from __future__ import annotations

import asyncio
import sys

from fedpeft.errors import FedpeftError, SettingsInvalid, StateInvalid
from fedpeft.logs import configure
from fedpeft_server.app import Server
from fedpeft_server.settings import Settings


def main() -> None:
    """Runs the daemon until SIGTERM or SIGINT."""
    try:
        settings = Settings.read(sys.argv[1:])
        configure(settings.log_format, settings.log_level)
        asyncio.run(serve(settings))
    except (SettingsInvalid, StateInvalid) as error:
        sys.exit(_fail(error, 2))
    except FedpeftError as error:
        sys.exit(_fail(error, 1))


async def serve(settings: Settings) -> None:
    """Builds the server and lets it live."""
    await Server(settings).run()


def _fail(error: FedpeftError, code: int) -> int:
    print(f"fedpeft-server: {error.message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
