"""Who teaches: the interface, and every teacher's memory across steps, checkpoints and ranks."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from torch import nn

from dlb_fast import (
    BakeLoss,
    CsKDLoss,
    DdgsdLoss,
    FeatureTap,
    Lesson,
    LogitBank,
    LsrKDLoss,
    ModelCopies,
    MrKDLoss,
    NoTeacher,
    PsKDLoss,
    Scene,
    TaughtLoss,
    Teacher,
    TfKDRegLoss,
    VirtualTeacher,
    ZipfLoss,
)
from dlb_fast import reference_family as ref

torch.set_num_threads(1)
CLASSES = 5


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))


def data(rows=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 7, generator=g), torch.randint(0, CLASSES, (rows,), generator=g)


class LastEpochMean(Teacher):
    """What a newcomer would write: the mean prediction per class so far teaches (one class, nothing registered)."""

    def __init__(self):
        self.sums = torch.zeros(CLASSES, CLASSES)

    def teach(self, scene):
        if not self.sums.any():
            return Lesson("none")
        return Lesson("probabilities", (self.sums / self.sums.sum(1, keepdim=True).clamp(min=1e-6))[scene.target])

    def observe(self, scene):
        self.sums.index_add_(0, scene.target, scene.logits.detach().softmax(1))

    def state_dict(self):
        return {"sums": self.sums.clone()}

    def load_state_dict(self, state):
        self.sums = state["sums"].clone()


def test_a_new_teacher_is_one_class(impl):
    if device_of(impl) != "cpu":
        pytest.skip("the class above keeps its sums on the CPU")
    criterion = TaughtLoss(LastEpochMean(), alpha=0.5, temperature=2.0, impl=impl)
    x, y = data()
    z = network()(x)
    assert criterion(z, y).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    teacher = criterion.teacher.sums.clone()
    teacher = (teacher / teacher.sum(1, keepdim=True).clamp(min=1e-6))[y]
    wanted = F.cross_entropy(z, y) + 0.5 * ref._kl(teacher, z, 2.0)
    assert criterion(z, y).item() == pytest.approx(wanted.item(), rel=1e-5)
    again = TaughtLoss(LastEpochMean(), alpha=0.5, temperature=2.0, impl=impl)
    again.load_state_dict(criterion.state_dict())
    assert again(z, y).item() == criterion(z, y).item()


def make(name):
    return {
        "none": lambda: TaughtLoss(NoTeacher()),
        "virtual": lambda: TaughtLoss(VirtualTeacher(0.9), alpha=0.2, ce_alpha=-1.0),
        "lsr_kd": LsrKDLoss,
        "tf_kd_reg": lambda: TfKDRegLoss(CLASSES),
        "mr_kd": lambda: MrKDLoss(copies=2, interval=1, ensemble=0.1),
        "bake": BakeLoss,
        "cs_kd": CsKDLoss,
        "ddgsd": DdgsdLoss,
        "ps_kd": lambda: PsKDLoss(8, CLASSES, epochs=4),
        "zipf": ZipfLoss,
    }[name]()


NAMES = ["none", "virtual", "lsr_kd", "tf_kd_reg", "mr_kd", "bake", "cs_kd", "ddgsd", "ps_kd", "zipf"]


def steps(model, criterion, optimizer, start, stop):
    losses = []
    for step in range(start, stop):
        x, y = data(seed=step)
        loss = criterion(model(x), y, torch.arange(8), images=x, epoch=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_state_eval_and_cost(name, tmp_path):
    """Four steps in one go equal two, a checkpoint read with weights_only, and two; eval touches nothing."""
    model, criterion = network(), make(name)
    criterion.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    first = steps(model, criterion, optimizer, 0, 2)
    saved = {"model": model.state_dict(), "criterion": criterion.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    whole = first + steps(model, criterion, optimizer, 2, 4)

    other, again = network(), make(name)
    again.attach(other)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.3)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["model"])
    again.load_state_dict(state["criterion"])
    optimizer.load_state_dict(state["optimizer"])
    assert first + steps(other, again, optimizer, 2, 4) == whole
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    before = copy.deepcopy(criterion.state_dict())
    x, y = data(seed=9)
    criterion.eval(), model.eval()
    z = model(x)
    assert criterion(z, y).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    assert str(before) == str(criterion.state_dict())
    assert len(criterion.cost().splitlines()) == 1
    assert criterion.parts.loss.item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mr_kd", "ps_kd", "bake"])
def test_missing_needs_are_named(name):
    criterion = make(name)
    if name == "mr_kd":
        criterion.attach(network())
    with pytest.raises((ValueError, RuntimeError), match="images=|epoch= and ids=|attach"):
        criterion(torch.zeros(8, CLASSES), torch.zeros(8, dtype=torch.int64))


class TestLogitBank:
    def test_ids_of_bytes_are_ids_and_no_mask(self):
        bank = LogitBank(4, 2)
        bank.store(torch.tensor([3, 1, 0, 1], dtype=torch.uint8), torch.tensor([[9.0, 0], [0, 9], [9, 0], [9, 0]]))
        rows, seen = bank.rows(torch.tensor([1, 0, 1, 2], dtype=torch.uint8), "cpu")
        assert rows.shape == (4, 2) and seen.tolist() == [True, True, True, False]
        assert rows[0].argmax() == 0

    def test_ps_kd_is_taught_by_the_last_visit(self, impl):
        device = device_of(impl)
        criterion = PsKDLoss(10, CLASSES, alpha=0.8, epochs=4, impl=impl)
        g = torch.Generator().manual_seed(0)
        z0, z1 = (2 * torch.randn(3, CLASSES, generator=g, device="cpu").to(device) for _ in range(2))
        y, ids = torch.tensor([0, 1, 2], device=device), torch.tensor([7, 3, 5], device=device)
        first = criterion(z0, y, ids, epoch=0)  # nothing seen: the label teaches, which is plain CE
        assert first.item() == pytest.approx(F.cross_entropy(z0, y).item(), rel=1e-5)
        order = torch.tensor([2, 0, 1], device=device)
        second = criterion(z1, y[order], ids[order], epoch=1)
        past = torch.softmax(z0[order].half().float(), 1)
        wanted = ref.ps_kd(z1.double(), y[order], past.double(), alpha=0.8 * 2 / 4)
        assert second.item() == pytest.approx(wanted.item(), rel=1e-3)  # the bank holds float16
        third = criterion(z0, y[order], ids[order], epoch=2)  # now the second visit teaches, not the first
        past = torch.softmax(z1.double(), 1)
        assert third.item() == pytest.approx(ref.ps_kd(z0.double(), y[order], past, alpha=0.6).item(), rel=1e-3)

    def test_unseen_rows_of_a_used_bank_teach_their_label(self):
        criterion = PsKDLoss(4, CLASSES, alpha=0.5)
        z, y = torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2])
        criterion(z, y, torch.tensor([0, 1]))
        assert criterion(z, y, torch.tensor([2, 3])).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)

    def test_unseen_and_ignored_rows(self):
        criterion = PsKDLoss(4, CLASSES, alpha=0.5)
        z = torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(1), requires_grad=True)
        criterion(z, torch.tensor([1, -100]), torch.tensor([0, 1])).backward()
        assert z.grad[1].abs().sum() == 0

    def test_size_is_told_before_training(self):
        bank = LogitBank(50_000, 100)
        assert bank.nbytes == 50_000 * 201 and bank._rows is None  # nothing allocated yet
        assert "50000 x 100 float16" in PsKDLoss(50_000, 100).cost() and "9.6 MiB" in PsKDLoss(50_000, 100).cost()

    def test_a_device_that_torch_does_not_know_is_refused_before_training(self):
        for make in (lambda: LogitBank(4, 3, device="foo"), lambda: ModelCopies(device="foo")):
            with pytest.raises(ValueError, match="device must be None or one such as 'cpu' or 'cuda:0', got 'foo'"):
                make()

    def test_another_set_is_refused(self):
        bank = LogitBank(4, 3)
        bank.store(torch.tensor([1]), torch.zeros(1, 3))
        with pytest.raises(ValueError, match="expected \\(5, 3\\)"):
            LogitBank(5, 3).load_state_dict(bank.state_dict())


class TestModelCopies:
    def test_ring_interval_and_order(self):
        model = nn.Linear(1, 1, bias=False)
        ring = ModelCopies(copies=2, interval=3)
        ring.attach(model)
        for step in range(1, 13):
            with torch.no_grad():
                model.weight.fill_(step)
            ring.update()
        assert sorted(float(one["weight"]) for one in ring.ring) == [9.0, 12.0]

    def test_copies_neither_touch_the_model_nor_follow_it(self):
        model = network()
        model[1].eval()  # a frozen BatchNorm stays as it is
        ring = ModelCopies(copies=1, interval=1)
        ring.attach(model)
        ring.update()
        x, _ = data()
        before = copy.deepcopy(model.state_dict())
        wanted = copy.deepcopy(model).eval()(x)
        with torch.no_grad():
            model[0].weight.zero_()
        before["0.weight"] = torch.zeros_like(before["0.weight"])
        logits = ring.logits(x)
        assert logits.shape == (1, 8, CLASSES) and not logits.requires_grad
        torch.testing.assert_close(logits[0], wanted)
        assert model.training and not model[1].training
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_bfloat16_storage_is_half(self):
        full, half = ModelCopies(3), ModelCopies(3, dtype=torch.bfloat16, device="cpu")
        for ring in (full, half):
            ring.attach(nn.Linear(64, 8))
        assert full.nbytes == 3 * 4 * (64 * 8 + 8) and half.nbytes * 2 == full.nbytes
        half.interval = 1
        half.update()
        assert half.ring[0]["weight"].dtype == torch.bfloat16
        assert half.logits(torch.ones(2, 64)).dtype == torch.float32

    def test_mr_kd_loss_is_its_definition(self, impl):
        if device_of(impl) != "cpu":
            pytest.skip("covered on the CPU")
        model = network()
        criterion = MrKDLoss(copies=2, interval=1, alpha=0.4, temperature=2.0, correct_share=0.9, swap=True, impl=impl)
        criterion.attach(model)
        copies = []
        for seed in (1, 2):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
            criterion.update()
            copies.append(copy.deepcopy(model).eval())
        x, y = data()
        z = model(x)
        heard = torch.stack([one(x) for one in copies]).detach()
        wanted = ref.mr_kd(z, y, heard, alpha=0.4, temperature=2.0, correct_share=0.9, swap=True)
        assert criterion(z, y, images=x).item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_the_ensemble_starts_as_the_average_and_learns_by_cross_entropy(self):
        model = network()
        criterion = MrKDLoss(copies=2, interval=1, ensemble=0.5)
        criterion.attach(model)
        criterion.update(), criterion.update()
        x, y = data()
        teacher = criterion.teacher
        heard = teacher.ring.logits(x)
        torch.testing.assert_close(teacher._ensembled(heard), heard.mean(0))
        weight, bias = (t.clone().requires_grad_() for t in teacher._layer)
        F.cross_entropy(heard.transpose(0, 1).flatten(1) @ weight.T + bias, y).backward()
        criterion(model(x), y, images=x)
        torch.testing.assert_close(teacher._layer[0], weight.detach() - 0.5 * weight.grad)
        torch.testing.assert_close(teacher._layer[1], bias.detach() - 0.5 * bias.grad)


class TestFeatureTap:
    def test_features_are_the_classifiers_input(self):
        model = network()
        criterion = BakeLoss()
        criterion.attach(model)
        x, y = data()
        z = model(x)
        features = model[2](model[1](model[0](x))).detach()
        wanted = ref.bake(z, features, y)
        assert criterion(z, y).item() == pytest.approx(wanted.item(), rel=1e-5)
        assert criterion(z, y, features=2 * features).item() == pytest.approx(wanted.item(), rel=1e-5)  # normalised

    def test_every_forward_is_taken_once(self):
        model = network()
        tap = FeatureTap(model, "3")
        model(data()[0])
        tap.take()
        with pytest.raises(RuntimeError, match="no forward in training mode"):
            tap.take()
        model.eval()(data()[0])
        with pytest.raises(RuntimeError, match="no forward in training mode"):
            tap.take()

    def test_layers_that_are_not_there(self):
        with pytest.raises(ValueError, match="has no layer 'head'"):
            FeatureTap(network(), "head")
        with pytest.raises(ValueError, match=r"has no nn\.Linear"):
            FeatureTap(nn.Conv2d(1, 1, 1))


def test_cs_kd_counts_anchors_only():
    criterion = CsKDLoss(alpha=2.0, temperature=3.0)
    z = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = criterion(z, y)
    assert loss.item() == pytest.approx(ref.cs_kd(z[:3], y[:3], z[3:], alpha=2.0, temperature=3.0).item(), rel=1e-5)
    loss.backward()
    assert z.grad[3:].abs().sum() == 0 and criterion.counted == 3


RANKS = """
import sys, torch, torch.distributed as dist
from dlb_fast import PsKDLoss, bake_loss, reference_family as ref
rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
g = torch.Generator().manual_seed(5)
z, f, y = torch.randn(12, 4, generator=g), torch.randn(12, 6, generator=g), torch.randint(0, 4, (12,), generator=g)
mine = slice(6 * rank, 6 * rank + 6)
own = z[mine].clone().requires_grad_()
loss = bake_loss(own, f[mine], y[mine], omega=0.9, temperature=2.0, cross_rank=True)
loss.backward()
alone = bake_loss(z[mine], f[mine], y[mine], omega=0.9, temperature=2.0)
joined = z.clone().requires_grad_()
whole = ref.bake(joined, f, y, omega=0.9, temperature=2.0)
whole.backward()
both = torch.stack([loss.detach(), alone])
dist.all_reduce(both)
assert abs(both[0] / 2 - whole) < 1e-5, (both[0] / 2, whole)   # the mean over ranks is one rank with the joined batch
assert abs(both[1] / 2 - whole) > 1e-3                          # and it is not what each rank does alone
torch.testing.assert_close(own.grad / 2, joined.grad[mine], rtol=1e-4, atol=1e-6)
ps = PsKDLoss(12, 4, cross_rank=True)
ps(own, y[mine], torch.arange(12)[mine])
assert bool(ps.teacher.bank._seen.all())                        # both ranks' rows are on every rank
torch.testing.assert_close(ps.teacher.bank._rows.float(), torch.log_softmax(z, 1), rtol=2e-3, atol=2e-3)
dist.destroy_process_group()
print("same", flush=True)
"""


def test_bake_on_two_ranks_is_one_rank_with_the_joined_batch(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "same" in out, err


def test_scene_and_lesson_are_what_contributing_says():
    assert Scene._fields == ("logits", "target", "temperature", "ids", "images", "epoch", "ignore_index")
    assert Lesson._fields[:4] == ("kind", "tensor", "correct_share", "mask")
