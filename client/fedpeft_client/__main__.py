"""`fedpeft-client`: takes part in federated fine-tuning with the data of this site; `--help` lists the exit codes."""

from __future__ import annotations

import sys
import traceback

from fedpeft.errors import FedpeftError
from fedpeft.process import durable
from fedpeft.process.start import check_command, naming_arguments, note, to_the_end
from fedpeft.rpc import grpc_core
from fedpeft.untrusted_text import print_anything
from fedpeft_client.commands.table import COMMANDS, listing
from fedpeft_client.error_policy import Exit, exit_code
from fedpeft_client.settings import Settings


def main() -> None:
    """Runs the client and ends the process with one of the exit codes of `fedpeft_client.error_policy`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs the client, or the command that stands first, and returns the exit code."""
    verbose = "-v" in arguments or "--verbose" in arguments
    print_anything()
    grpc_core.configure()  # before anything imports gRPC, which reads the environment as it is imported
    try:
        with durable.naming_files(), to_the_end("fedpeft-client"), naming_arguments(arguments):
            if arguments and (command := COMMANDS.get(arguments[0])):
                return command.load()(arguments[1:])
            check_command(arguments, COMMANDS)
            settings = _settings(arguments)
            verbose = settings.verbose
            from fedpeft_client.app import serve  # only now: --help and wrong usage need no gRPC

            serve(settings)
            return Exit.DONE
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except (FedpeftError, OSError) as error:
        if verbose:
            traceback.print_exc()
        note(f"fedpeft-client: {error}")
        return exit_code(error)


def _settings(arguments: list[str]) -> Settings:
    try:
        return Settings.read(arguments)
    except SystemExit:
        if "-h" in arguments or "--help" in arguments:
            print(listing())
        raise


if __name__ == "__main__":
    main()
