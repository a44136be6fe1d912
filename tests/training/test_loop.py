"""Local training with real tuned models on real images, and a stand-in where roles or faults are wanted."""

import io
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from structlog.testing import capture_logs
from torch import nn

from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.config import ModelConfig, TrainingConfig
from fedpeft.data.dataset import dataset_of, open_dataset
from fedpeft.data.sources.interface import Selection
from fedpeft.data.sources.opening import open_source
from fedpeft.data.transforms import Preprocessing
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.models.backbones import build
from fedpeft.models.tasks import task_of
from fedpeft.peft import tune
from fedpeft.training import gradients as gradients_module
from fedpeft.training import loop
from fedpeft.training import precision as precision_module
from fedpeft.training.batches import BatchOrder, split
from fedpeft.training.loss_meter import LossMeter
from fedpeft.training.precision import precision

CLASSES = ("dark", "light")
train = partial(loop.train, task_of(""))
INPUT = Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def write_images(root, count, broken=()):
    """Writes dark and light noise as image folders; file k of all is k.png."""
    generator = np.random.default_rng(0)
    for k in range(count):
        folder = root / CLASSES[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        low = 0 if k % 2 == 0 else 100
        out = io.BytesIO()
        Image.fromarray(generator.integers(low, low + 156, (8, 8, 3)).astype(np.uint8)).save(out, "PNG")
        (folder / f"{k:04}.png").write_bytes(b"broken" if k in broken else out.getvalue())
    return root


def data(root, count=30, broken=(), **options):
    return open_dataset(write_images(root / f"images-{count}", count, broken), CLASSES, INPUT, **options)


class StandIn:
    """A linear model with dropout: two tensors, roles as given."""

    def __init__(self, weight=(TensorRole.SENT,), bias=(TensorRole.SENT,), dropout=0.0):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(192, 2))
        self.spec = AdapterSpec.of("test", [TensorSpec("2.weight", (2, 192), weight), TensorSpec("2.bias", (2,), bias)])

    checkpointing = False

    def checkpoint(self):
        return False

    def state(self):
        return {n: p.detach().numpy().copy() for n, p in sorted(self.module.named_parameters())}

    @property
    def tensors(self):
        return dict(sorted(self.module.named_parameters()))

    def trainable(self, number):
        roles = {t.name: t.role(number) for t in self.spec.tensors}
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(roles[name] is not TensorRole.FROZEN)
            parameter.grad = None
        return {n: p for n, p in sorted(self.module.named_parameters()) if p.requires_grad}

    def train(self):
        self.module.train()

    def eval(self):
        self.module.eval()


def vit(method="bias", **options):
    name = "vit_tiny_patch16_224"
    config = ModelConfig(name=name, weights="none", image_size=32, depth=1, classes=CLASSES)
    return tune(build(config, 0), method, options, 0)


def images_of(root):
    return open_dataset(write_images(root / "x", 12), CLASSES, Preprocessing.of(vit().backbone))


def settings(**changes):
    return TrainingConfig(**{"batch_size": 8, "learning_rate": 0.05, "augmentation": "crop", **changes})


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("method", ["full", "head", "bias", "adapter", "prompt", "lora"])
def test_every_method_learns_repeats_bit_for_bit_and_sends_what_moved(tmp_path, method):
    results = []
    for _ in range(2):
        model = vit(method)
        backbone = {n: p.clone() for n, p in model.backbone.module.named_parameters()}
        start = model.state()
        dataset = open_dataset(write_images(tmp_path / "x", 30), CLASSES, Preprocessing.of(model.backbone))
        results.append(train(model, dataset, settings(epochs=2), seed=5, number=1))
        assert all(torch.equal(p, backbone[n]) for n, p in model.backbone.module.named_parameters())
        assert all(np.allclose(start[n] + d, model.state()[n], atol=1e-6) for n, d in results[-1].delta.items())
    first, second = results
    assert same(first.delta, second.delta)
    assert sorted(first.delta) == [t.name for t in model.spec.sent(1)]
    assert all(np.abs(delta).max() > 0 for delta in first.delta.values())
    assert all(delta.dtype == np.float32 for delta in first.delta.values())
    assert first.local == {}
    assert first.examples == 30
    assert first.metrics["steps"] == 8
    assert first.metrics["loss"] < first.metrics["loss_first"] or method == "head"
    assert first.metrics["threads"] == 1
    assert first.facts["precision"] == "float32"


def test_one_step_is_plain_nesterov_sgd_with_weight_decay(tmp_path):
    model, dataset = StandIn(), data(tmp_path, 4)
    start = model.state()
    pixels = torch.stack([dataset[i][0] for i in range(4)])
    labels = torch.tensor(dataset.labels)
    result = train(model, dataset, settings(batch_size=4, augmentation="none", weight_decay=0.1), seed=1, number=1)
    weight = torch.tensor(start["2.weight"], requires_grad=True)
    logits = pixels.flatten(1) @ weight.T + torch.tensor(start["2.bias"])
    loss = nn.functional.cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    gradient = gradient + 0.1 * torch.tensor(start["2.weight"])
    # First step of Nesterov: the buffer is g, the direction g + 0.9 g.
    assert np.allclose(result.delta["2.weight"], (-0.05 * 1.9 * gradient).detach(), atol=1e-6)
    assert result.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_momentum_does_not_leak_from_one_call_to_the_next(tmp_path):
    dataset, wanted = data(tmp_path), settings(steps=3, momentum=0.9)
    model = StandIn()
    first = train(model, dataset, wanted, seed=1, number=1)
    fresh = StandIn()
    assert same(train(fresh, dataset, wanted, seed=1, number=1).delta, first.delta)
    second = train(model, dataset, wanted, seed=2, number=2)
    copied = StandIn()
    copied.module.load_state_dict(fresh.module.state_dict())
    assert same(train(copied, dataset, wanted, seed=2, number=2).delta, second.delta)


def test_roles_choose_what_is_sent_kept_and_left_in_each_round(tmp_path):
    dataset = data(tmp_path)
    model = StandIn(weight=(TensorRole.SENT, TensorRole.FROZEN), bias=(TensorRole.LOCAL,))
    odd = train(model, dataset, settings(), seed=1, number=1)
    assert odd.delta.keys() == {"2.weight"}
    assert odd.local.keys() == {"2.bias"}
    assert np.array_equal(odd.local["2.bias"], model.state()["2.bias"])
    before = model.state()
    even = train(model, dataset, settings(), seed=1, number=2)
    assert even.delta == {}
    assert np.array_equal(model.state()["2.weight"], before["2.weight"])
    assert not np.array_equal(even.local["2.bias"], before["2.bias"])
    with pytest.raises(TrainingFailed, match="trains no tensor in round 1"):
        train(StandIn((TensorRole.FROZEN,), (TensorRole.FROZEN,)), dataset, settings(), seed=1, number=1)


def test_the_last_smaller_batch_is_trained_and_counted(tmp_path):
    seen = []
    model = StandIn()
    model.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    result = train(model, data(tmp_path, 30), settings(epochs=2), seed=1, number=1)
    assert seen == [8, 8, 8, 6] * 2
    assert result.examples == 30


def test_every_pass_has_every_image_once_in_another_order(tmp_path):
    dataset = data(tmp_path, 30)
    orders = BatchOrder(settings(epochs=3), 30, 7)
    passes = [np.concatenate(list(orders)[k * 4 : k * 4 + 4]).tolist() for k in range(3)]
    assert all(sorted(p) == list(range(30)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3
    assert BatchOrder(settings(steps=3), 30, 7).steps == 3
    assert len(list(BatchOrder(settings(steps=9), 30, 7))) == 9
    assert train(StandIn(), dataset, settings(steps=9), seed=7, number=1).metrics["steps"] == 9


def test_adamw_and_plain_sgd_train_as_well(tmp_path):
    dataset = data(tmp_path)
    for changes in ({"optimizer": "adamw", "learning_rate": 0.01}, {"momentum": 0.0, "learning_rate": 0.01}):
        result = train(StandIn(), dataset, settings(epochs=5, **changes), seed=1, number=1)
        assert result.metrics["loss"] < result.metrics["loss_first"]


def test_seeds_matter_and_shuffling_and_dropout_repeat(tmp_path):
    dataset = data(tmp_path)
    results = [train(StandIn(dropout=0.5), dataset, settings(), seed, 1) for seed in (1, 1, 2)]
    assert same(results[0].delta, results[1].delta)
    assert not same(results[0].delta, results[2].delta)


def test_generators_of_other_devices_are_not_seeded(tmp_path, monkeypatch):
    def everywhere(seed):
        raise AssertionError("torch.manual_seed seeds every GPU, and only one is put back")

    model = StandIn(dropout=0.5)
    plain = train(model, data(tmp_path), settings(), 1, 1)
    again = StandIn(dropout=0.5)
    monkeypatch.setattr(torch, "manual_seed", everywhere)
    assert same(train(again, data(tmp_path), settings(), 1, 1).delta, plain.delta)


def test_global_generator_is_left_alone(tmp_path):
    dataset, model = data(tmp_path), StandIn(dropout=0.5)
    before = torch.get_rng_state()
    train(model, dataset, settings(), 1, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("capacity", [1, 3, 4, 5])
def test_a_batch_that_does_not_fit_is_halved_and_the_step_is_the_same(tmp_path, capacity):
    dataset = data(tmp_path, 30)
    plain = train(StandIn(), dataset, settings(), seed=1, number=1)
    model = StandIn()

    def full(_, inputs):
        if len(inputs[0]) > capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.module.register_forward_pre_hook(full)
    with capture_logs() as logs:
        halved = train(model, dataset, settings(), seed=1, number=1)
    assert halved.metrics["micro_batch"] == {1: 1, 3: 2, 4: 4, 5: 4}[capacity]
    assert [log["event"] for log in logs].count("out_of_gpu_memory") == {1: 3, 3: 2, 4: 1, 5: 1}[capacity]
    assert halved.metrics["steps"] == plain.metrics["steps"]
    assert halved.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-6)
    for name, delta in plain.delta.items():
        assert np.allclose(halved.delta[name], delta, atol=1e-6)


def test_running_out_of_memory_in_the_backward_pass_leaves_no_gradient(tmp_path):
    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.n = len(x)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if ctx.n > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradient

    dataset = data(tmp_path, 30)
    plain = train(StandIn(), dataset, settings(), seed=1, number=1)
    model = StandIn()
    model.module.register_forward_hook(lambda _, inputs, logits: Full.apply(logits))
    halved = train(model, dataset, settings(), seed=1, number=1)
    assert all(np.allclose(halved.delta[n], d, atol=1e-6) for n, d in plain.delta.items())


def test_where_one_image_does_not_fit_its_activations_are_computed_again(tmp_path):
    model = vit()
    dataset = open_dataset(write_images(tmp_path / "x", 6), CLASSES, Preprocessing.of(model.backbone))

    def full(_, inputs):
        if not model.checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.module.register_forward_pre_hook(full)
    with capture_logs() as logs:
        result = train(model, dataset, settings(batch_size=2), seed=1, number=1)
    assert result.metrics["micro_batch"] == 1 and result.metrics["steps"] == 3
    assert [log["checkpointing"] for log in logs] == [False, True]


@pytest.mark.parametrize(("dropout", "said"), [(0.0, False), (0.5, True)])
def test_halves_with_dropout_are_said_to_draw_otherwise(tmp_path, dropout, said):
    model = StandIn(dropout=dropout)

    def full(_, inputs):
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.module.register_forward_pre_hook(full)
    with capture_logs() as logs:
        train(model, data(tmp_path), settings(), seed=1, number=1)
    assert ["other draws of dropout" in log["effect"] for log in logs] == [said]


def test_not_even_one_image_fits(tmp_path):
    model = StandIn()

    def full(_, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.module.register_forward_pre_hook(full)
    with pytest.raises(TrainingFailed, match="not even one image fits"):
        train(model, data(tmp_path), settings(), seed=1, number=1)


def test_a_stop_is_honoured_between_steps(tmp_path):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 2

    model = StandIn()
    with pytest.raises(TrainingFailed, match="stopped as asked, after 2 of 4 steps"):
        train(model, data(tmp_path), settings(), seed=1, number=1, stop=stop)
    assert not model.module.training


def test_progress_comes_at_the_beginning_about_once_a_second_and_at_the_end(tmp_path, monkeypatch):
    clock = iter(np.arange(0, 1000, 0.4))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    reports = []
    train(StandIn(), data(tmp_path), settings(epochs=2), seed=1, number=1, progress=reports.append)
    first, *reports = reports
    assert first.step == 0 and np.isnan(first.loss)
    assert [r.step for r in reports] == [3, 6, 8]
    assert {first.steps, *(r.steps for r in reports)} == {8}
    assert all(np.isfinite(r.loss) and r.images_per_second > 0 for r in reports)


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    model = StandIn()
    calls = []

    def spoil(_, inputs, logits):
        calls.append(1)
        return logits * float("nan") if len(calls) == 3 else logits

    model.module.register_forward_hook(spoil)
    with pytest.raises(TrainingFailed, match="the loss is nan in step 3"):
        train(model, data(tmp_path), settings(), seed=1, number=1)


def test_a_tensor_that_is_not_finite_is_no_update(tmp_path):
    model = StandIn()
    model.module[2].bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingFailed, match=r"tensor 2\.bias is not finite after 1 step;"):
        train(model, data(tmp_path), settings(steps=1), seed=1, number=1)


def test_losses_looked_at_late_name_the_right_step():
    losses = LossMeter(every=10)
    for value in (1.0, 2.0, float("inf"), 1.0):
        losses.add(torch.tensor(value), 4, True)
    with pytest.raises(TrainingFailed, match="inf in step 3"):
        losses.flush()


def test_an_empty_data_set(tmp_path):
    whole = open_source(write_images(tmp_path / "x", 4))
    with pytest.raises(DataInvalid):
        dataset_of(Selection(whole, np.empty(0, np.int64)), CLASSES, INPUT)
    with pytest.raises(DataInvalid, match="no images"):
        data(tmp_path).subset(np.empty(0, np.int64))


def test_precision_on_a_cpu():
    cpu = torch.device("cpu")
    assert precision("auto", cpu) is torch.float32
    assert precision("float16", cpu) is torch.float32
    assert precision("bfloat16", cpu) is torch.bfloat16


def test_bfloat16_on_a_cpu_when_asked_for(tmp_path):
    result = train(StandIn(), data(tmp_path), settings(epochs=5, precision="bfloat16"), seed=1, number=1)
    assert result.facts["precision"] == "bfloat16"
    assert result.metrics["loss"] < result.metrics["loss_first"]


METHODS = ["full", "head", "bias", "adapter", "prompt", "lora"]


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_keeps_the_bits_and_less_memory(tmp_path, method):
    deltas, kept = [], []
    for checkpointed in (False, True):
        model = vit(method, **({"dropout": 0.2} if method in ("prompt", "lora") else {}))
        if checkpointed:
            assert model.checkpoint() and not model.checkpoint()
        dataset = open_dataset(write_images(tmp_path / "x", 12), CLASSES, Preprocessing.of(model.backbone))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.nbytes), x)[1], lambda x: x
        ):
            deltas.append(train(model, dataset, settings(), seed=1, number=1).delta)
        kept.append(sum(sizes))
    assert same(*deltas)
    assert kept[1] < kept[0] or method == "head"


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_held_in_bfloat16_train_the_bits_that_autocast_does(tmp_path, method, monkeypatch):
    deltas = []
    for held in (True, False):
        model = vit(method)
        before = {n: p.clone() for n, p in model.backbone.module.named_parameters()}
        dataset = open_dataset(write_images(tmp_path / "x", 12), CLASSES, Preprocessing.of(model.backbone))
        seen = []
        model.module.blocks[0].mlp.fc1.register_forward_pre_hook(lambda m, _, seen=seen: seen.append(m.weight.dtype))
        if not held:
            monkeypatch.setattr(loop, "lowered", lambda module, dtype: nullcontext())
        deltas.append(train(model, dataset, settings(precision="bfloat16"), seed=1, number=1).delta)
        assert set(seen) == {torch.bfloat16 if held and method != "full" else torch.float32}
        assert all(torch.equal(p, before[n]) for n, p in model.backbone.module.named_parameters())
    assert same(*deltas)


def test_a_step_that_overflows_float16_is_repeated_and_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "precision", lambda wanted, device: torch.float16)
    results = []
    for scale in (2.0**4, 2.0**30):
        monkeypatch.setattr(precision_module, "INITIAL_SCALE", scale)
        with capture_logs() as logs:
            results.append(train(StandIn(dropout=0.3), data(tmp_path), settings(), seed=1, number=1))
    modest, repeated = results
    assert [log["event"] for log in logs].count("float16_overflow") > 0
    assert repeated.metrics["steps"] == modest.metrics["steps"] == 4
    assert all(np.allclose(repeated.delta[n], d, atol=1e-3) for n, d in modest.delta.items())
    assert all(d.any() for d in repeated.delta.values())


def gradients_of(monkeypatch, root, model=None, **changes):
    """Returns the Euclidean norm of the gradient that each step was made with, and the result."""
    norms, make = [], loop.optimizer_of

    def optimizer_of(settings, parameters):
        optimizer = make(settings, parameters)
        gradients = lambda: [p.grad.double().square().sum() for p in parameters]  # noqa: E731
        optimizer.register_step_pre_hook(lambda *_: norms.append(float(sum(gradients()) ** 0.5)))
        return optimizer

    monkeypatch.setattr(loop, "optimizer_of", optimizer_of)
    result = train(model or StandIn(), data(root), settings(epochs=3, **changes), seed=1, number=1)
    monkeypatch.setattr(loop, "optimizer_of", make)
    return np.array(norms), result


@pytest.mark.parametrize("float16", [False, True])
def test_no_step_has_a_longer_gradient_than_asked_for(tmp_path, monkeypatch, float16):
    if float16:
        monkeypatch.setattr(loop, "precision", lambda wanted, device: torch.float16)
        monkeypatch.setattr(precision_module, "INITIAL_SCALE", 2.0**30)  # the first steps overflow and are repeated
    free, _ = gradients_of(monkeypatch, tmp_path)
    bound = 0.9 * float(free[np.isfinite(free)].max())
    kept = StandIn(bias=(TensorRole.LOCAL,))  # it trains the same, and keeps a tensor: the norm is of both
    for model in (StandIn(), kept):
        norms, result = gradients_of(monkeypatch, tmp_path, model, clip_gradient_norm=bound)
        made = norms[-12:]
        assert result.metrics["steps"] == 12 and made.max() <= bound * (1 + 1e-6)
        assert made.max() == pytest.approx(bound, rel=1e-4) and made.min() < bound * 0.999, "and shorter ones stay"


def test_a_bound_that_is_never_reached_changes_no_bit(tmp_path):
    for changes in ({}, {"precision": "bfloat16"}, {"optimizer": "adamw"}):
        plain = train(vit(), dataset := images_of(tmp_path), settings(**changes), seed=1, number=1)
        bounded = train(vit(), dataset, settings(clip_gradient_norm=1e30, **changes), seed=1, number=1)
        assert same(plain.delta, bounded.delta)


def test_halves_of_a_batch_are_clipped_as_the_whole_of_it(tmp_path, monkeypatch):
    """The gradient is bounded once a step, not once a micro-batch."""
    deltas = []
    for micro in (8, 3):
        monkeypatch.setattr(gradients_module, "split", lambda batch, size, micro=micro: split(batch, micro))
        model, wanted = StandIn(), settings(clip_gradient_norm=0.05, momentum=0.0, weight_decay=0.0)
        deltas.append(train(model, data(tmp_path), wanted, seed=1, number=1).delta)
    assert all(np.allclose(deltas[0][n], d, rtol=1e-4, atol=1e-7) for n, d in deltas[1].items())
    moved = sum(float(np.square(d).sum()) for d in deltas[0].values()) ** 0.5
    assert 0.5 * 4 * 0.05 * 0.05 < moved <= 4 * 0.05 * 0.05 * (1 + 1e-5), "four steps of the rate times the bound"


def test_gradients_that_overflow_float16_at_any_scale_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "precision", lambda wanted, device: torch.float16)
    model = StandIn()
    model.module[2].bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingFailed, match="overflow float16 unscaled; take precision bfloat16"):
        train(model, data(tmp_path), settings(), seed=1, number=1)
