from __future__ import annotations

import errno

import pytest

from .ports import _take, free_port


def test_a_port_that_was_drawn_is_not_drawn_again_before_its_server_listens() -> None:
    port = free_port()
    with pytest.raises(OSError) as refused:
        _take(port)
    assert refused.value.errno == errno.EADDRINUSE
