"""The `fedpeft-server` command, before its modules are imported."""

from fedpeft.process.start import begin


def main() -> None:
    """Runs `fedpeft-server`."""
    begin("fedpeft_server.__main__")
