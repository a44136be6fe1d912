"""Privacy as the fold of a round meets it: the fold asks the run's mechanism, and knows none by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from fedpeft.config import RunConfig
from fedpeft.privacy import accounting
from fedpeft.privacy.central import Central, NoisedSum
from fedpeft.privacy.events import Event, StepsNoised
from fedpeft.privacy.statement import EPSILON
from fedpeft.privacy.transforms import transforms_of


class RoundPrivacy:
    """The part of a run's privacy in its rounds; of this class itself, where nobody adds noise.

    Args:
        config: The run file.

    Attributes:
        judges: True if updates may be left out for what they are.
        central: The noise of the server's; None where it adds none.
    """

    judges: ClassVar[bool] = True
    central: Central | None = None

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def noised_sum(self, norms: Iterable[tuple[str, float]], past: Sequence[Event], values: int) -> NoisedSum | None:
        """Returns the rule of a round's sum; None if it has no noise.

        Args:
            norms: Each client with the norm of its update.
            past: Events of all rounds before, oldest first.
            values: Values in an update.
        """
        return None

    def events(self, count: int, norms: Iterable[float], past: Sequence[Event]) -> tuple[Event, ...]:
        """Returns the events of a round.

        Args:
            count: Number of folded updates.
            norms: Of each of them; read only where they decide something.
            past: Events of all rounds before, oldest first.
        """
        return tuple(transform.event(count) for transform in transforms_of(self._config))

    def figures(self, past: Sequence[Event], before: float, spent: Iterable[float]) -> dict[str, float]:
        """Returns the figures of a round.

        Args:
            past: Events of all rounds, this one's too.
            before: Epsilon of the committed round before; 0 where there is none.
            spent: Epsilon that each client of this round says it has spent, 0 where it says none.
        """
        return {}


class ClientNoise(RoundPrivacy):
    """Noise of each client's own: it keeps its own budget, and says what it spent."""

    def figures(self, past: Sequence[Event], before: float, spent: Iterable[float]) -> dict[str, float]:
        """See `RoundPrivacy.figures`; the epsilon of the client that spent most, in this round or an earlier one."""
        return {EPSILON: max(before, *spent)}


class StepNoise(ClientNoise):
    """Noise in each step of the clients' training."""

    def events(self, count: int, norms: Iterable[float], past: Sequence[Event]) -> tuple[Event, ...]:
        """See `RoundPrivacy.events`; of the run file alone, as a client's figures are its word."""
        privacy = self._config.privacy
        assert privacy is not None and privacy.clip_norm is not None  # it names this mechanism
        return (StepsNoised(privacy.clip_norm, privacy.noise_multiplier, count),)


class CentralNoise(RoundPrivacy):
    """Noise of the server's, in the sum.

    No update is left out: that it was would say something of the others, and the bound does the work.
    """

    judges = False

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        assert config.privacy is not None  # it names this mechanism
        self._delta = config.privacy.delta or 0.0
        self.central: Central = Central(config.privacy, config.rounds.clients)

    def noised_sum(self, norms: Iterable[tuple[str, float]], past: Sequence[Event], values: int) -> NoisedSum | None:
        """See `RoundPrivacy.noised_sum`."""
        return self.central.noised_sum(dict(norms), past, values)

    def events(self, count: int, norms: Iterable[float], past: Sequence[Event]) -> tuple[Event, ...]:
        """See `RoundPrivacy.events`; draws the noise of the count of updates within the bound."""
        return super().events(count, norms, past) + self.central.events(norms, past)

    def figures(self, past: Sequence[Event], before: float, spent: Iterable[float]) -> dict[str, float]:
        """See `RoundPrivacy.figures`; the epsilon of the run."""
        return {EPSILON: accounting.epsilon(past, self._delta)}


_KINDS = {None: RoundPrivacy, "central": CentralNoise, "local": ClientNoise, "example": StepNoise}


def round_privacy_of(config: RunConfig) -> RoundPrivacy:
    """Returns that of a run."""
    return _KINDS[config.privacy.mechanism if config.privacy else None](config)
