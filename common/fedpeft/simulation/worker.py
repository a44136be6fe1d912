"""A worker process of a simulation: it loads model and data, and trains the jobs that its parent sends.

Messages are pickles over a socket, which is standard input: first `Inputs`, the number of torch's threads, and the
digests of data that the parent has read already; then jobs, each answered by its outcome, or by an error that ends the
simulation. The end of the stream means that the parent is gone: the process ends at once.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

from fedpeft.errors import FedpeftError
from fedpeft.process import logs


def main() -> None:
    """Answers jobs until the parent closes the stream."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the whole group; the parent decides when to stop
    connection = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    logs.to_standard_error()
    received: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_receive, args=(connection, received), daemon=True).start()
    try:
        _train(connection, received)
    except (FedpeftError, OSError) as error:
        connection.send(error)


def _receive(connection: Connection, received: queue.Queue[Any]) -> None:
    """Passes messages on; runs beside the computation so that the end of the parent is seen at any time."""
    while True:
        try:
            received.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def _train(connection: Connection, received: queue.Queue[Any]) -> None:
    import torch  # seconds

    from fedpeft.data.contents import take_digests
    from fedpeft.simulation.local_trainer import LocalTrainer

    inputs, threads, digests = received.get()
    torch.set_num_threads(threads)
    take_digests(digests)
    trainer = LocalTrainer(inputs)
    while True:
        connection.send(trainer.train(received.get()))


if __name__ == "__main__":
    main()
