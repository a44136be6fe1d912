"""The windows that `fedpeft top` opens over its screen: a question, and the keys."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

KEYS = """\
 up, down  select a run             1    current round: its tickets
 p         pause or resume the run  2    all rounds: accuracy, bytes
 x         stop the run             3    clients
 s         change the sort order    tab  switch between tables
 ?         show this help           q    quit; runs continue

 Pause, resume and stop ask for confirmation, and need the operator
 role. If the server cannot be reached, the top line says so until
 the connection is back."""


class Question(ModalScreen[bool]):
    """Asks before something is done; nothing but `y` means yes."""

    BINDINGS: ClassVar[list[BindingType]] = [("y", "answer(True)", "Yes"), ("n,escape,enter,q", "answer(False)", "No")]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """Lays the window out."""
        with Vertical():
            yield Static(f"{self._text}\n\n  y  yes      n  no", markup=False)

    def action_answer(self, answer: bool) -> None:
        """Closes the window."""
        self.dismiss(answer)


class Keys(ModalScreen[None]):
    """Shows the keys until any of a few is pressed."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,enter,space,question_mark", "close", "Close")]

    def compose(self) -> ComposeResult:
        """Lays the window out."""
        with Vertical():
            yield Static(f"{KEYS}\n\n  escape  back", markup=False)

    def action_close(self) -> None:
        """Closes the window."""
        self.dismiss(None)
