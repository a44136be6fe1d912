"""`fedpeft-server`: the daemon, and `fedpeft-server init`, which makes its certificates.

Exit codes: 0 done, or stopped by a signal; 1 failed; 2 wrong settings.
"""

from __future__ import annotations

import asyncio
import sys

from fedpeft import grpc_core
from fedpeft.errors import FedpeftError, IdentityInvalid, SettingsInvalid, StateInvalid
from fedpeft.logs import configure
from fedpeft_server.settings import Settings


def main() -> None:
    """Runs the daemon until SIGTERM or SIGINT."""
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["init"]:
            from fedpeft_server import init

            sys.exit(init.main(arguments[1:]))
        settings = _settings(arguments)
        configure(settings.log_format, settings.log_level)
        grpc_core.configure()
        from fedpeft_server.app import Server  # only now: gRPC reads the environment as it is imported

        asyncio.run(Server(settings).run())
    except (SettingsInvalid, StateInvalid, IdentityInvalid) as error:
        sys.exit(_fail(error, 2))
    except FedpeftError as error:
        sys.exit(_fail(error, 1))


def _settings(arguments: list[str]) -> Settings:
    try:
        return Settings.read(arguments)
    except SystemExit:
        if "-h" in arguments or "--help" in arguments:
            print("\ncommand, with a --help of its own:\n  init    make the certificates of server and operator")
        raise


def _fail(error: FedpeftError, code: int) -> int:
    print(f"fedpeft-server: {error.message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
