"""The loop that one would write by hand, in one process."""

import torch
from same_work import CLIENTS, ROUNDS, ended, model, train, tuned

torch.set_num_threads(1)
module = model()
values = {name: p.detach().clone() for name, p in tuned(module).items()}
for number in range(1, ROUNDS + 1):
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    for client in range(CLIENTS):
        with torch.no_grad():
            for name, parameter in tuned(module).items():
                parameter.copy_(values[name])
        train(module, client)
        for name, parameter in tuned(module).items():
            total[name] += parameter.detach() / CLIENTS
    values = total
    ended(number)
