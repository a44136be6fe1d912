"""Flower's simulation: actors of one CPU each on a local Ray, its own FedAvg."""

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from same_work import CLIENTS, IMAGES, ROUNDS, ended, model, train, tuned

client_app, server_app = ClientApp(), ServerApp()


@cache
def kept() -> torch.nn.Module:
    """The model of an actor, built once."""
    torch.set_num_threads(1)
    return model()


@client_app.train()
def train_client(message: Message, context: Context) -> Message:
    """Trains a client from the received values."""
    module = kept()
    module.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    train(module, int(context.node_config["partition-id"]))
    arrays = ArrayRecord({name: p.detach() for name, p in tuned(module).items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": IMAGES})})
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that says when a round has ended."""

    def aggregate_train(self, server_round, replies):
        """See FedAvg."""
        result = super().aggregate_train(server_round, replies)
        ended(server_round)
        return result


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Holds the rounds."""
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=CLIENTS, min_train_nodes=CLIENTS)
    first = ArrayRecord({name: p.detach() for name, p in tuned(model()).items()})
    strategy.start(grid=grid, initial_arrays=first, num_rounds=ROUNDS)


def run() -> None:
    """Holds the simulation; called by a process that imported this module, because actors import it by its name."""
    run_simulation(
        server_app, client_app, CLIENTS, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    )
