"""A Flower app: each client adds one to a vector; the server averages and notes each round."""

import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Adds one."""
    (values,) = message.content["arrays"].to_numpy_ndarrays()
    time.sleep(float(context.run_config["client-s"]))
    content = RecordDict({"arrays": ArrayRecord([values + 1]), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


class Noting(FedAvg):
    """FedAvg that appends a line a round to a file: its number, its value, its updates, the time."""

    def __init__(self, log, **more):
        super().__init__(**more)
        self.log = log

    def aggregate_train(self, server_round, replies):
        """See FedAvg."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        value = arrays.to_numpy_ndarrays()[0][0] if arrays else "none"
        with open(self.log, "a") as file:
            file.write(f"{server_round} {value} {len(replies)} {time.time()}\n")
        return arrays, metrics


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Holds the rounds."""
    said = context.run_config
    clients = int(said["clients"])
    fewest = {"min_available_nodes": clients, "min_train_nodes": clients}
    strategy = Noting(str(said["log"]), fraction_train=1.0, fraction_evaluate=0.0, **fewest)
    zeros = ArrayRecord([np.zeros(int(said["values"]), np.float32)])
    strategy.start(grid=grid, initial_arrays=zeros, num_rounds=int(said["rounds"]))
