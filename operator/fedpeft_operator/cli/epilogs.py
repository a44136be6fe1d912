"""Text below the options in each `--help`: examples that work, a hint, and the exit codes."""

from __future__ import annotations

from fedpeft_operator.cli.exit_codes import Exit, in_help

OF_ANY = (Exit.DONE, Exit.FAILED, Exit.USAGE)
"""Exit codes of every command."""
OF_SERVER = (Exit.UNREACHABLE,)
"""Further exit codes of a command that talks to a server."""
OF_NAMED = (Exit.UNREACHABLE, Exit.NOT_FOUND)
"""Further exit codes of a command about one run, version, client, identity or token."""


def epilog(*examples: str, hint: str = "", ends: tuple[Exit, ...] = ()) -> str:
    """Returns the text, a paragraph a line, as typer wants it.

    Args:
        examples: Whole commands, without a prompt.
        hint: A sentence to go with them.
        ends: Exit codes beside those of any command.
    """
    title = "Example:" if len(examples) == 1 else "Examples:"
    lines = (title, *(f"$ {example}" for example in examples), hint, in_help({*OF_ANY, *ends}))
    return "\n\n".join(line for line in lines if line)
