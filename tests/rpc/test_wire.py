"""Messages that say what a client in another language must not have to guess."""

from __future__ import annotations

import pytest

from fedpeft.config import TrainingConfig
from fedpeft.rpc.wire import training_to_proto


@pytest.mark.parametrize(
    ("given", "epochs", "steps"), [({}, 1, None), ({"epochs": 4}, 4, None), ({"steps": 9}, None, 9)]
)
def test_settings_have_either_epochs_or_steps(given: dict[str, int], epochs: int | None, steps: int | None) -> None:
    message = training_to_proto(TrainingConfig.model_validate(given))
    said = {name: getattr(message, name) if message.HasField(name) else None for name in ("epochs", "steps")}
    assert said == {"epochs": epochs, "steps": steps}
