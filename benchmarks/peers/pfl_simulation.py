"""pfl's simulation in one process, its own federated averaging."""

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from same_work import BATCH, CLIENTS, RATE, ROUNDS, ended, model, optimizer, tensors
from torch.nn import functional


class Model(torch.nn.Module):
    """The model with the loss that pfl asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, inputs):
        """Returns the logits."""
        return self.inner(inputs)

    def loss(self, inputs, labels, is_eval=False):
        """Returns the mean loss."""
        return functional.cross_entropy(self(inputs), labels)

    def metrics(self, inputs, labels, is_eval=False):
        """No figure."""
        return {}


class Timed(TrainingProcessCallback):
    """Says when a round has ended."""

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """See TrainingProcessCallback."""
        ended(central_iteration + 1)
        return False, Metrics()


torch.set_num_threads(1)
module = Model()
central = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
data = FederatedDataset(
    lambda client: PyTorchTensorDataset(list(tensors(client))), get_user_sampler("minimize_reuse", range(CLIENTS))
)
FederatedAveraging().run(
    NNAlgorithmParams(ROUNDS, 2 * ROUNDS, CLIENTS, None),  # scores in the first round only, which is left out
    SimulatedBackend(data, data),
    PyTorchModel(module, lambda parameters, *_, **__: optimizer(iter(parameters)), central),
    NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH),
    callbacks=[Timed()],
)
