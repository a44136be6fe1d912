"""The `fedpeft-client` command, before its modules are imported."""

from fedpeft.process.start import begin


def main() -> None:
    """Runs `fedpeft-client`."""
    begin("fedpeft_client.__main__")
