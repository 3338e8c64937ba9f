"""What methods remember: across steps, resets and checkpoints, over several ranks, and never from ignored rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from method_cases import CLASSES, make
from torch import nn

from dlb_fast import (
    BakeLoss,
    DistillationLoss,
    FeatureHook,
    LogitBank,
    LsrKDLoss,
    MrKDLoss,
    PsKDLoss,
    Teacher,
    WeightSnapshots,
)
from dlb_fast.methods import METHODS, bake, mr_kd, ps_kd
from dlb_fast.reference import teacher_kl

torch.set_num_threads(1)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))


def data(rows=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 7, generator=g), torch.randint(0, CLASSES, (rows,), generator=g)


class Run:
    """A small training run with one criterion."""

    def __init__(self, criterion):
        self.model, self.criterion = network(), criterion
        criterion.setup(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3)

    def steps(self, start, stop):
        losses = []
        for step in range(start, stop):
            x, y = data(seed=step)
            ids = (torch.arange(8) + 4 * step) % 8  # overlapping halves, and every sample comes back
            loss = self.criterion(self.model(x), y, ids, images=x, epoch=step)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.criterion.step()
            losses.append(loss.item())
        return losses

    def state(self):
        return {n: copy.deepcopy(getattr(self, n).state_dict()) for n in ("model", "criterion", "optimizer")}

    def load(self, state):
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


def same(one, other):
    """Whether two states are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class ClassMeans(DistillationLoss):
    """What a newcomer would write: the mean prediction for every class so far is the teacher."""

    def __init__(self, **options):
        super().__init__(**options)
        self.sums = torch.zeros(CLASSES, CLASSES)

    def teacher(self, inputs):
        if not self.sums.any():
            return Teacher("none")
        return Teacher("probabilities", (self.sums / self.sums.sum(1, keepdim=True).clamp(min=1e-6))[inputs.target])

    def record(self, inputs):
        self.sums.index_add_(0, inputs.target, inputs.logits.softmax(1))

    def reset(self):
        self.sums.zero_()

    def get_extra_state(self):
        return self.sums.clone()

    def set_extra_state(self, state):
        self.sums = state.clone()


NEW = {"class_means": lambda: ClassMeans(alpha=0.5, temperature=2.0)}
ALL = [*METHODS, *NEW]


def create(name):
    return NEW[name]() if name in NEW else make(name)


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_continues_bit_for_bit(name, stop, tmp_path):
    """Saved after an odd number of steps, when a ring of two is at its other place; read with weights_only."""
    whole, first = Run(create(name)), Run(create(name))
    losses = whole.steps(0, 6)
    assert first.steps(0, stop) == losses[:stop]
    torch.save(first.state(), tmp_path / "state.pt")
    second = Run(create(name))
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.steps(stop, 6) == losses[stop:]
    assert same(second.state(), whole.state())


@pytest.mark.parametrize("name", ALL)
def test_reset_gives_a_fresh_criterion(name):
    used, fresh = Run(create(name)), Run(create(name))
    used.steps(0, 3)
    used.criterion.reset()
    used.load({part: fresh.state()[part] for part in ("model", "optimizer")})
    if name not in ("dlb", "two_view"):  # whose buffer keeps its address and size
        assert same(used.criterion.state_dict(), fresh.criterion.state_dict())
    assert used.steps(3, 6) == fresh.steps(3, 6)
    assert same(used.state(), fresh.state())


@pytest.mark.parametrize("name", ALL)
def test_eval_touches_no_memory_and_cost_is_one_line(name):
    run = Run(create(name))
    run.steps(0, 3)
    before = copy.deepcopy(run.criterion.state_dict())
    x, y = data(seed=9)
    run.criterion.eval(), run.model.eval()
    z = run.model(x)
    assert run.criterion(z, y).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    assert same(run.criterion.state_dict(), before)
    assert len(run.criterion.cost().splitlines()) == 1


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("dlb", "two_view")])
def test_ignored_rows_touch_no_memory(name, ignore_index):
    """Whatever the ignored rows hold, the memory afterwards is the same. (DLB's rows teach without a label as well.)"""
    states = []
    for scale in (1.0, -5.0):
        run = Run(make(name, ignore_index=ignore_index))
        run.steps(0, 3)
        x, y = data(seed=4)
        y[::2] = ignore_index
        x[::2] *= scale
        z = run.model.eval()(x)
        run.model.train()
        if name == "bake":
            run.criterion(z, y, features=x)
        else:
            run.criterion(z, y, torch.arange(8), images=x, epoch=3)
        states.append(copy.deepcopy(run.criterion.state_dict()))
    assert same(*states)


@pytest.mark.parametrize(
    ("name", "missing"), [("mr_kd", "images="), ("ps_kd", "epoch= and ids="), ("elr", "ids="), ("bake", "setup")]
)
def test_missing_needs_are_named(name, missing):
    criterion = make(name)
    if name == "mr_kd":
        criterion.setup(network())
    with pytest.raises((ValueError, RuntimeError), match=missing):
        criterion(torch.zeros(8, CLASSES), torch.zeros(8, dtype=torch.int64))


def test_a_new_method_is_one_class(impl):
    if device_of(impl) != "cpu":
        pytest.skip("the class above keeps its sums on the CPU")
    criterion = ClassMeans(alpha=0.5, temperature=2.0, impl=impl)
    x, y = data()
    z = network()(x)
    assert criterion(z, y).item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    teacher = (criterion.sums / criterion.sums.sum(1, keepdim=True).clamp(min=1e-6))[y]
    wanted = F.cross_entropy(z, y) + 0.5 * teacher_kl(teacher, z, 2.0)
    assert criterion(z, y).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_method_without_memory_has_no_state(tmp_path):
    """Weights saved with it load without it and the reverse; a method with memory misses its own."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), LsrKDLoss())
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    with pytest.raises(RuntimeError, match="_extra_state"):
        PsKDLoss(4, 3).load_state_dict({})


class TestLogitBank:
    def test_ids_of_bytes_are_ids_and_no_mask(self):
        bank = LogitBank(4, 2)
        bank.store(torch.tensor([3, 1, 0, 1], dtype=torch.uint8), torch.tensor([[9.0, 0], [0, 9], [9, 0], [9, 0]]))
        rows, seen = bank.rows(torch.tensor([1, 0, 1, 2], dtype=torch.uint8), "cpu")
        assert rows.shape == (4, 2) and seen.tolist() == [True, True, True, False]
        assert rows[0].argmax() == 0

    def test_rows_that_are_not_kept_change_nothing(self):
        bank = LogitBank(3, 2)
        bank.store(torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        before = copy.deepcopy(bank.state_dict())
        bank.store(torch.tensor([1, 2]), torch.tensor([[0.0, 5.0], [0.0, 6.0]]), torch.tensor([False, False]))
        assert same(bank.state_dict(), before) and bank.state_dict()["rows"].shape == (3, 2)

    def test_reset_forgets(self):
        bank = LogitBank(3, 2)
        bank.store(torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
        bank.reset()
        assert bank.state_dict() == {} and not bank.rows(torch.tensor([0]), "cpu")[1].any()

    def test_ps_kd_learns_from_the_last_visit(self, impl):
        device = device_of(impl)
        criterion = PsKDLoss(10, CLASSES, alpha=0.8, epochs=4, impl=impl)
        g = torch.Generator().manual_seed(0)
        z0, z1 = (2 * torch.randn(3, CLASSES, generator=g, device="cpu").to(device) for _ in range(2))
        y, ids = torch.tensor([0, 1, 2], device=device), torch.tensor([7, 3, 5], device=device)
        first = criterion(z0, y, ids, epoch=0)  # nothing seen: the label is the teacher, which is plain CE
        assert first.item() == pytest.approx(F.cross_entropy(z0, y).item(), rel=1e-5)
        order = torch.tensor([2, 0, 1], device=device)
        second = criterion(z1, y[order], ids[order], epoch=1)
        past = torch.softmax(z0[order].half().float(), 1)
        wanted = ps_kd.reference(z1.double(), y[order], past.double(), alpha=0.8 * 2 / 4)
        assert second.item() == pytest.approx(wanted.item(), rel=1e-3)  # the bank holds float16
        third = criterion(z0, y[order], ids[order], epoch=2)  # now the second visit is the teacher, not the first
        past = torch.softmax(z1.double(), 1)
        assert third.item() == pytest.approx(ps_kd.reference(z0.double(), y[order], past, alpha=0.6).item(), rel=1e-3)

    def test_unseen_rows_of_a_used_bank_learn_from_their_label(self):
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
        for make_one in (lambda: LogitBank(4, 3, device="foo"), lambda: WeightSnapshots(device="foo")):
            with pytest.raises(ValueError, match="device must be None or one such as 'cpu' or 'cuda:0', got 'foo'"):
                make_one()

    def test_another_set_is_refused(self):
        bank = LogitBank(4, 3)
        bank.store(torch.tensor([1]), torch.zeros(1, 3))
        with pytest.raises(ValueError, match="expected \\(5, 3\\)"):
            LogitBank(5, 3).load_state_dict(bank.state_dict())


def snapshots_of(steps, **options):
    """Snapshots of a single weight that equals the number of the step."""
    model = nn.Linear(1, 1, bias=False)
    kept = WeightSnapshots(**options)
    kept.setup(model)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.fill_(step)
        kept.step()
    return kept


class TestWeightSnapshots:
    @pytest.mark.parametrize(
        ("steps", "kept"), [(2, []), (3, [3.0]), (6, [3.0, 6.0]), (9, [9.0, 6.0]), (12, [9.0, 12.0])]
    )
    def test_the_oldest_gives_way(self, steps, kept):
        assert [float(one["weight"]) for one in snapshots_of(steps, copies=2, copy_every=3).kept] == kept

    def test_other_numbers_than_those_saved_are_refused(self):
        state = snapshots_of(9, copies=2, copy_every=3).state_dict()
        for options in ({"copies": 3, "copy_every": 3}, {"copies": 1, "copy_every": 3}, {"copies": 2, "copy_every": 8}):
            with pytest.raises(ValueError, match="2 snapshots after 9 steps do not fit copies="):
                snapshots_of(0, **options).load_state_dict(state)

    def test_used_without_a_model(self):
        with pytest.raises(RuntimeError, match=r"call criterion.setup\(model\) once"):
            WeightSnapshots(copy_every=1).step()

    def test_copies_neither_touch_the_model_nor_follow_it(self):
        model = network()
        model[1].eval()  # a frozen BatchNorm stays as it is
        kept = WeightSnapshots(copies=1, copy_every=1)
        kept.setup(model)
        kept.step()
        x, _ = data()
        before = copy.deepcopy(model.state_dict())
        wanted = copy.deepcopy(model).eval()(x)
        with torch.no_grad():
            model[0].weight.zero_()
        before["0.weight"] = torch.zeros_like(before["0.weight"])
        logits = kept.logits(x)
        assert logits.shape == (1, 8, CLASSES) and not logits.requires_grad
        torch.testing.assert_close(logits[0], wanted)
        assert model.training and not model[1].training
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_bfloat16_storage_is_half(self):
        full, half = WeightSnapshots(3), WeightSnapshots(3, 1, dtype=torch.bfloat16, device="cpu")
        for kept in (full, half):
            kept.setup(nn.Linear(64, 8))
        assert full.nbytes == 3 * 4 * (64 * 8 + 8) and half.nbytes * 2 == full.nbytes
        half.step()
        assert half.kept[0]["weight"].dtype == torch.bfloat16
        assert half.logits(torch.ones(2, 64)).dtype == torch.float32

    def test_mr_kd_loss_is_its_definition(self, impl):
        if device_of(impl) != "cpu":
            pytest.skip("covered on the CPU")
        model = network()
        options = {"alpha": 0.4, "temperature": 2.0, "correct_share": 0.9, "swap": True}
        criterion = MrKDLoss(copies=2, copy_every=1, impl=impl, **options)
        criterion.setup(model)
        copies = []
        for seed in (1, 2):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
            criterion.step()
            copies.append(copy.deepcopy(model).eval())
        x, y = data()
        z = model(x)
        past = torch.stack([one(x) for one in copies]).detach()
        wanted = mr_kd.reference(z, y, past, **options)
        assert criterion(z, y, images=x).item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_the_ensemble_starts_as_the_average_and_learns_by_cross_entropy(self):
        model = network()
        criterion = MrKDLoss(copies=2, copy_every=1, ensemble_lr=0.5, ignore_index=1)
        criterion.setup(model)
        criterion.step(), criterion.step()
        x, y = data()
        assert (y == 1).any()
        past = criterion.snapshots.logits(x)
        start = criterion._ensemble_for(past, False)
        torch.testing.assert_close(mr_kd.ensembled(past, *start), past.mean(0))
        weight, bias = (t.clone().requires_grad_() for t in start)
        F.cross_entropy(past.transpose(0, 1).flatten(1) @ weight.T + bias, y, ignore_index=1).backward()
        criterion(model(x), y, images=x)
        torch.testing.assert_close(criterion._ensemble[0], weight.detach() - 0.5 * weight.grad)
        torch.testing.assert_close(criterion._ensemble[1], bias.detach() - 0.5 * bias.grad)


class TestFeatureHook:
    def test_features_are_the_classifiers_input(self):
        model = network()
        criterion = BakeLoss()
        criterion.setup(model)
        x, y = data()
        z = model(x)
        features = model[2](model[1](model[0](x))).detach()
        wanted = bake.reference(z, features, y)
        assert criterion(z, y).item() == pytest.approx(wanted.item(), rel=1e-5)
        assert criterion(z, y, features=2 * features).item() == pytest.approx(wanted.item(), rel=1e-5)  # normalised

    def test_every_forward_is_taken_once(self):
        model = network()
        hook = FeatureHook(model, "3")
        model(data()[0])
        hook.take()
        with pytest.raises(RuntimeError, match="no forward in training mode"):
            hook.take()
        model.eval()(data()[0])
        with pytest.raises(RuntimeError, match="no forward in training mode"):
            hook.take()

    def test_a_second_setup_takes_the_first_hook_off(self):
        first, second = network(), network()
        criterion = BakeLoss(layer=first[3])
        assert not list(criterion.parameters())  # the layer is the model's, not the criterion's
        criterion = BakeLoss()
        criterion.setup(first), criterion.setup(second)
        first(data()[0])
        with pytest.raises(RuntimeError, match="no forward in training mode"):
            criterion.hook.take()

    def test_reset_drops_features_that_were_not_taken(self):
        model, criterion = network(), BakeLoss()
        criterion.setup(model)
        z = model(data()[0])
        criterion.reset()
        with pytest.raises(RuntimeError, match="no forward in training mode"):
            criterion(z, data()[1])

    def test_layers_that_are_not_there(self):
        with pytest.raises(ValueError, match="has no layer 'head'"):
            FeatureHook(network(), "head")
        with pytest.raises(ValueError, match=r"has no nn\.Linear"):
            FeatureHook(nn.Conv2d(1, 1, 1))
