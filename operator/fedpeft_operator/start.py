"""The `fedpeft` command, before its modules are imported."""

from fedpeft.process.start import begin


def main() -> None:
    """Runs `fedpeft`."""
    begin("fedpeft_operator.app")
