"""The step against the official algorithm, written out in plain PyTorch, in float64."""

import pytest
import torch
import torch.nn.functional as F
from builders import distance
from torch import nn

from benchmarks.step_calls import step_calls
from dlb_fast import LastBatchLoss
from dlb_fast.data import Batch
from dlb_fast.train.log import RunLog
from dlb_fast.train.loop import Trainer, training_loss

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

STEPS, HALF, CLASSES = 50, 8, 5
ALPHA, TEMPERATURE = 1.3, 2.5


def network(norm: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.Tanh()]
    layers += [nn.Flatten(), nn.Linear(6 * 25, CLASSES)]
    return nn.Sequential(*layers).double()


def make_halves(count: int = STEPS):
    """Per step of the official loader: (view 0, view 1, labels, ids), the two views of a sample differing."""
    generator = torch.Generator().manual_seed(5)
    halves = []
    for step in range(count):
        base = torch.randn(HALF, 2, 5, 5, dtype=torch.float64, generator=generator)
        noise = torch.randn(2, HALF, 2, 5, 5, dtype=torch.float64, generator=generator)
        labels = torch.randint(0, CLASSES, (HALF,), generator=generator)
        ids = torch.arange(HALF) + HALF * step
        halves.append((base + 0.3 * noise[0], base + 0.3 * noise[1], labels, ids))
    return halves


def make_batches(halves):
    """The same data as the batches `[old: view 1 of the half before | new: view 0]` our loaders give."""
    batches = []
    for step, (view0, _, labels, ids) in enumerate(halves):
        if step == 0:
            batches.append(Batch(view0, labels, ids, 0, 0, 0))
            continue
        _, old, old_labels, old_ids = halves[step - 1]
        parts = torch.cat((old, view0)), torch.cat((old_labels, labels)), torch.cat((old_ids, ids))
        batches.append(Batch(*parts, HALF, 0, step))
    return batches


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def official(model, halves):
    """dlb.py of Meta-knowledge-Lab/DLB@8949a46, `train_one_epoch`, its statements in its order."""
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 35], 0.1)
    pre_data = pre_out = None
    model.train()
    for view0, view1, label, _ in halves:
        out = model(view0)
        if pre_data is not None:
            pre_images, pre_label = pre_data
            out_pre = model(pre_images)
            ce_loss = F.cross_entropy(torch.cat((out_pre, out)), torch.cat((pre_label, label)))
            log_student = F.log_softmax(out_pre / TEMPERATURE, dim=1)
            teacher = F.softmax(pre_out.detach() / TEMPERATURE, dim=1)
            dml_loss = F.kl_div(log_student, teacher, reduction="batchmean") * TEMPERATURE * TEMPERATURE
            loss = ce_loss + ALPHA * dml_loss
        else:
            loss = F.cross_entropy(out, label)
        pre_data, pre_out = (view1, label), out
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


def ours(model, batches, **settings):
    criterion = LastBatchLoss(CLASSES, alpha=ALPHA, temperature=TEMPERATURE)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 35], 0.1)
    trainer = Trainer(
        model, criterion, optimizer, batches, scheduler=scheduler, log=RunLog(quiet=True), epochs=1, **settings
    )
    result = trainer.fit()
    assert result["step"] == len(batches) and result["images_seen"] == sum(map(len, batches))
    return model


def apart(a: nn.Module, b: nn.Module) -> float:
    return distance(a.double().state_dict(), b.double().state_dict())


@pytest.mark.parametrize("norm", [True, False], ids=["batchnorm", "no-norm"])
def test_two_pass_equals_the_official_code(norm):
    halves = make_halves()
    theirs = official(network(norm), halves)
    mine = ours(network(norm), make_batches(halves), forward="two_pass")
    assert apart(network(norm), theirs) > 1e-2  # it did train
    assert apart(mine, theirs) < 1e-9  # parameters, and the running statistics with their two updates a step


def test_joint_equals_two_pass_without_norm_only():
    batches = make_batches(make_halves())
    plain = [ours(network(False), batches, forward=f) for f in ("joint", "two_pass")]
    assert apart(*plain) < 1e-9
    normed = [ours(network(True), batches, forward=f) for f in ("joint", "two_pass")]
    assert apart(*normed) > 1e-4


def test_two_pass_runs_the_new_rows_first():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x[:, 0].clone())
            return torch.cat((x, x), 1)

    batch = Batch(torch.arange(6.0).view(6, 1), torch.zeros(6, dtype=torch.long), torch.arange(6), 2, 0, 1)
    training_loss(Spy(), nn.CrossEntropyLoss(), batch, forward="two_pass")
    assert [s.tolist() for s in seen] == [[2, 3, 4, 5], [0, 1]]


def test_accumulation_equals_one_larger_batch():
    """Plain CE without norm: two batches of 8 with their losses halved are one batch of 16."""
    halves = make_halves(8)
    small = [Batch(v, y, i, 0, 0, s) for s, (v, _, y, i) in enumerate(halves)]
    pairs = zip(small[::2], small[1::2], strict=True)
    large = [
        Batch(torch.cat((a.images, b.images)), torch.cat((a.targets, b.targets)), torch.cat((a.ids, b.ids)), 0, 0, s)
        for s, (a, b) in enumerate(pairs)
    ]
    models = []
    for batches, accumulate in ((small, 2), (large, 1)):
        model = network(False)
        trainer = Trainer(
            model, nn.CrossEntropyLoss(), sgd(model), batches, log=RunLog(quiet=True), epochs=1, accumulate=accumulate
        )
        assert trainer.fit()["step"] == 4
        models.append(model)
    assert apart(*models) < 1e-12


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_clipping_bounds_the_norm_of_the_gradient_that_the_optimiser_gets(amp):
    """Under fp16 the scaler's factor has to be divided out first: a scaled one would be clipped to next to nothing."""
    model = network(False).float()
    norms = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
            return super().step(closure)

    optimizer = Watch(model.parameters(), lr=0.1)
    batches = make_batches([(a.float(), b.float(), y, i) for a, b, y, i in make_halves(4)])
    settings = {"epochs": 1, "clip_grad": 0.01, "amp": amp}
    Trainer(model, LastBatchLoss(CLASSES), optimizer, batches, log=RunLog(quiet=True), **settings).fit()
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_close_to_full_precision(amp):
    halves = [(a.float(), b.float(), y, i) for a, b, y, i in make_halves(20)]
    models = {}
    for setting in ("none", amp):
        model = network(True).float()
        seen = []
        model[-1].register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.dtype))
        models[setting] = ours(model, make_batches(halves), amp=setting)
        assert set(seen) == {{"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[setting]}
    assert all(torch.isfinite(p).all() for p in models[amp].parameters())
    assert 0 < apart(models["none"], models[amp]) < 0.05


def test_unknown_forward_is_refused():
    with pytest.raises(ValueError, match="forward must be one of joint, two_pass, partners, got 'three'"):
        Trainer(network(False), nn.CrossEntropyLoss(), sgd(network(False)), [], forward="three", max_steps=1)


def test_one_steady_step_stays_short():
    """The calls of ours in the trainer's own files: batch, forward and backward, metrics, optimiser, learning rate."""
    found = step_calls()
    assert len([file for file, _ in found.trace if file.startswith("train/")]) <= 9, found.trace


def test_one_steady_step_can_be_read_through():
    found = step_calls()
    assert (found.calls <= 50, found.files <= 12, found.switches <= 24) == (True, True, True), found.trace
