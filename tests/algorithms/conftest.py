from collections.abc import Iterator

import pytest

from fedpeft.models.tasks import tasks

from ..outside_package import looked_up_anew
from .quadratic import Quadratic


@pytest.fixture
def quadratic() -> Iterator[None]:
    """Makes the task known as another package's would be."""
    with looked_up_anew(tasks):
        tasks.register("quadratic")(Quadratic)
        yield
