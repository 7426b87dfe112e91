"""What every rank does in ``test_equivalence.py``: each case once with all ranks and once alone, on the same images.

Started by torchrun; rank 0 writes a JSON of relative differences to the file named on the command line.
"""

import json
import sys
import warnings

import torch
from torch import nn

from fastadvisor.iterations import build_iteration
from fastadvisor.metagrad import ForwardEngine, GradientSamplers, LayerwiseEngine, LearnedLayers, ValidatedEngine
from fastadvisor.models import cut_at, layers_of
from fastadvisor.models.sync_batch_norm import synchronise
from fastadvisor.runtime import ranks as module
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.ranks import ALONE, Ranks
from fastadvisor.runtime.watch import Watch
from fastadvisor.training.parameter_groups import parameter_groups
from tests.metagrad.problem import SIZE, batch, problem

ITERATIONS, TRAIN, META = 3, 16, 8


def exact(execution, task):
    return ForwardEngine(execution)


def top(execution, task):
    return ForwardEngine(execution, cut_at(task.model, (SIZE, SIZE), 1))


def random_layers(execution, task):
    return LayerwiseEngine(ForwardEngine(execution), task.model, layers_of(task.model, (SIZE, SIZE)), 2)


def learned_layers(execution, task):
    layers = layers_of(task.model, (SIZE, SIZE))
    torch.manual_seed(7)
    learned = LearnedLayers(GradientSamplers(len(layers)).double(), 2)
    return LayerwiseEngine(ForwardEngine(execution), task.model, layers, 2, learned)


def watched(execution, task):
    return ValidatedEngine(top(execution, task), exact(execution, task), 1, 0.99, lambda _: None, ranks=execution.ranks)


CASES = {
    "ce": ({"method": "ce"}, exact, {}),
    "mfrw-mes": ({"method": "mfrw-mes"}, exact, {}),
    "mfrw, momentum in the virtual step": ({"method": "mfrw"}, exact, {"virtual_with_optimizer": True}),
    "mes, one step behind": ({"method": "mes", "beta_draw": "sample"}, exact, {"behind": True}),
    "mfrw, lean": ({"method": "mfrw"}, exact, {"lean": True}),
    "mfrw, attached": ({"method": "mfrw"}, exact, {"attached": True}),
    "mfrw-mes, accumulated": ({"method": "mfrw-mes"}, exact, {"accumulate": 2}),
    "mfrw, accumulated, one step behind": ({"method": "mfrw"}, top, {"accumulate": 2, "behind": True}),
    "ce, accumulated": ({"method": "ce"}, exact, {"accumulate": 2}),
    "mfrw, top stage": ({"method": "mfrw"}, top, {}),
    "mfrw, random layers": ({"method": "mfrw"}, random_layers, {}),
    "mfrw, learned layers": ({"method": "mfrw"}, learned_layers, {}),
    "mfrw, watched": ({"method": "mfrw"}, watched, {}),
    "mw-net": ({"method": "mw-net"}, exact, {}),
    "mw-net, weights that sum to 1": ({"method": "mw-net", "weight_normalization": "sum"}, exact, {}),
    "mw-net, sum, attached": ({"method": "mw-net", "weight_normalization": "sum"}, exact, {"attached": True}),
    "l2rw": ({"method": "l2rw"}, exact, {}),
    "elr": ({"method": "elr"}, exact, {}),
    "mfrw, clipped": ({"method": "mfrw"}, exact, {"clip": 0.05}),
    "mfrw, layer-wise rates": ({"method": "mfrw"}, exact, {}),
}


def norms(network, kind, ranks):
    """Make the batch normalisations of a network those of all ranks, or constants, or leave them."""
    if kind == "synchronised":
        synchronise(network, ranks)
    elif kind == "frozen":
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def train(case, ranks, kind):
    """Return every number that training leaves behind, as one vector."""
    settings, engine, changes = CASES[case]
    task = problem(network="groupnorm" if kind == "none" else "batchnorm", **settings)
    task.model.train()
    task.method.batch_mean = lambda values: ranks.total(values.mean()) / ranks.count
    execution = Execution(ranks=ranks)
    chosen = engine(execution, task)
    norms(task.model.model, kind, ranks)  # finding the cuts would unfreeze them
    decay = 0.5 if "layer-wise" in case else 1.0
    optimizer = torch.optim.SGD(parameter_groups(task.model, decay, 0.1), lr=0.1, momentum=0.9, weight_decay=5e-4)
    advisor = None if task.method.advisor is None else torch.optim.SGD(task.method.advisor.parameters(), lr=10.0)
    step = build_iteration(task.model, task.method, optimizer, advisor, chosen, execution, watch=Watch(ranks=ranks), **changes)
    generator = torch.Generator().manual_seed(11)
    torch.manual_seed(5)
    if ranks.count > 1:
        execution.common.split_off()
        torch.manual_seed(100 + ranks.rank)  # what each draws by itself must not matter
    losses = []
    for _ in range(ITERATIONS):
        whole, meta = batch(TRAIN, generator), batch(META, generator)
        if ranks.count > 1:
            whole, meta = (one.split(ranks.count)[ranks.rank] for one in (whole, meta))
        result = step(whole, meta if task.method.learns else None)
        (loss,) = ranks.average([result.loss])
        losses.append(loss)
    left = [*task.model.state_dict().values(), *task.method.state_dict().values()]
    if isinstance(step.engine, LayerwiseEngine) and step.engine.learned is not None:
        left += list(step.engine.learned.samplers.parameters())
    return torch.cat([*(value.detach().double().flatten() for value in left), torch.stack(losses)])


def count_early():
    """Return a list that grows with each bucket that leaves while gradients are still to come."""
    early = []
    send = module._Buckets._send

    def spy(self):
        if any(self.missing):
            early.append(len(self.flying))
        send(self)

    module._Buckets._send = spy
    return early


def main(path):
    warnings.filterwarnings("ignore")
    module.BUCKET_BYTES = 2048  # several buckets for these small networks
    early = count_early()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    ranks = Ranks.from_environment()
    found = {}
    for case in CASES:
        for kind in ("frozen", "synchronised", "none"):
            if (kind == "none" and case != "mfrw-mes") or (kind == "synchronised" and "accumulated" in case):
                continue  # ranks and micro-batches cut a batch in another order, so micro-batches have other statistics
            together = train(case, ranks, kind)
            alone = train(case, ALONE, "frozen" if kind == "frozen" else "plain" if kind == "synchronised" else kind)
            difference = (together - alone).norm() / alone.norm()
            found[f"{case} ({kind})"] = float(max(torch.stack(ranks.average([difference])) * ranks.count))
    found["buckets that left before the backward pass was over, none (0) or some"] = 0.0 if early else 1.0
    if ranks.first:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file)
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1])
