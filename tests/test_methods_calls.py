"""How loops call a method: the same batch again, calls that are no training, batches that are not finite.

The oracle of a batch that is evaluated again is a criterion that never saw it: made anew and given the state from
before the batch. Everything is float64, and equal to 1e-12.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from method_cases import BANKS, CASES, CLASSES, SIBLINGS, make, takes
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import dlb_fast
from dlb_fast import BakeLoss, DistillationLoss, LastBatchLoss, MrKDLoss, PsKDLoss, Teacher, _args
from dlb_fast.methods import METHODS, bake, mr_kd, ps_kd
from dlb_fast.methods._common import chosen

ROWS = 8


class ClassMeans(DistillationLoss):
    """What a newcomer would write: the mean prediction for every class so far is the teacher."""

    def __init__(self, **options):
        super().__init__(**options)
        self.sums = self.before = torch.zeros(CLASSES, CLASSES, dtype=torch.float64)

    def teacher(self, inputs):
        self.met = chosen(inputs.again, self.before, self.sums)
        shares = (self.met + 1e-3) / (self.met + 1e-3).sum(1, keepdim=True)
        return Teacher("probabilities", shares[inputs.target])

    def record(self, inputs):
        self.before = self.met
        self.sums = self.met.index_add(0, inputs.target, inputs.logits.softmax(1))

    def reset(self):
        super().reset()
        self.sums = self.before = torch.zeros_like(self.sums)

    def get_extra_state(self):
        return self.sums.clone()

    def set_extra_state(self, state):
        self.reset()
        self.sums = self.before = state.clone()


def create(name, **options):
    if name == "class_means":
        return ClassMeans(alpha=0.5, temperature=2.0, **options)
    if name in BANKS:
        options.setdefault("memory_dtype", torch.float64)
    return make(name, **options)


ALL = [*METHODS, "class_means"]
REMEMBERS = ["dlb", "mr_kd", "ps_kd", "elr", "class_means"]
WITHOUT_IDS = [name for name in ALL if name not in BANKS]


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def batch(step, with_ids=True):
    """Every second half comes back as the next first half, and every sample comes back later."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 7, generator=g, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (ROWS,), generator=g)
    start = step * ROWS // 2
    ids = torch.arange(start, start + ROWS) % (2 * ROWS)
    given = {"target": y, "images": x, "epoch": step}
    return x, {**given, "ids": ids} if with_ids else given


def ready(name, steps=3, with_ids=True, **options):
    """A model and its criterion after some steps, so that the teacher has something to say."""
    if name in BANKS:
        options.setdefault("num_samples", 2 * ROWS)
    model, criterion = network(), create(name, **options)
    criterion.setup(model)
    half = ROWS // 2
    for step in range(steps):
        x, given = batch(step, with_ids)
        if step == 0 and isinstance(criterion, LastBatchLoss):  # the first batch of a stream is all new
            x, given = x[half:], {k: v[half:] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        train(model, criterion, x, given)
        criterion.step()
    return model, criterion


def train(model, criterion, x, given, lr=0.3):
    loss, grads = evaluate(model, criterion, x, given)
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            p -= lr * g
    return loss


def evaluate(model, criterion, x, given):
    """Loss and gradients of a plain training call."""
    loss = criterion(model(x), **given)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def alike(criterion, model, state):
    """A criterion that was made anew and given a state."""
    new = copy.deepcopy(criterion)
    if isinstance(new, BakeLoss):
        new.hook = None
    new.reset()
    new.setup(model)
    new.load_state_dict(state)
    return new


def state_of(criterion):
    return copy.deepcopy(criterion.state_dict())


def memory(criterion):
    """What a criterion remembers, without the counters of its calls."""
    if isinstance(criterion, LastBatchLoss):
        return criterion.buffer.logits, criterion.buffer.ids
    return state_of(criterion)


def close(one, other):
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        [close(one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        [close(a, b) for a, b in zip(one, other, strict=True)]
    else:
        assert one == other


def perturbed(model, grads, radius=0.2):
    """The weights of SAM's second pass."""
    scale = radius / torch.stack([g.norm() for g in grads]).norm()
    return [(p.detach() + scale * g).clone() for p, g in zip(model.parameters(), grads, strict=True)]


def set_weights(model, weights):
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)


def known_by(names):
    """How the batch is known; methods with a bank have ids in any case."""
    both = [(name, by) for name in names for by in ("ids", "same_batch", "both")]
    return pytest.mark.parametrize(("name", "by"), [(n, by) for n, by in both if n not in BANKS or by != "same_batch"])


def block(by, criterion):
    """Around the calls of one batch."""
    return nullcontext() if by == "ids" else criterion.same_batch()


@known_by(ALL)
def test_two_passes_of_sam(name, by):
    model, criterion = ready(name, with_ids=by != "same_batch")
    for step in (3, 4, 5):
        x, given = batch(step, by != "same_batch")
        given["epoch"] = 3  # of the whole epoch
        before, weights = state_of(criterion), [p.detach().clone() for p in model.parameters()]
        with block(by, criterion):
            first, grads = evaluate(model, criterion, x, given)
            moved = perturbed(model, grads)
            set_weights(model, moved)
            second, grads = evaluate(model, criterion, x, given)
        oracle = network()
        set_weights(oracle, weights)
        one = alike(criterion, oracle, before)
        want_first, want_grads = evaluate(oracle, one, x, given)
        set_weights(oracle, perturbed(oracle, want_grads))
        two = alike(criterion, oracle, before)
        want_second, want_grads = evaluate(oracle, two, x, given)
        close((first, second, grads), (want_first, want_second, want_grads))
        close(memory(criterion), memory(two))
        set_weights(model, [w - 0.3 * g for w, g in zip(weights, grads, strict=True)])
        if step == 4:
            criterion.step()


@pytest.mark.parametrize(
    ("name", "with_ids"), [*[(name, True) for name in ALL], *[(name, False) for name in WITHOUT_IDS]]
)
@pytest.mark.parametrize("inside", ["head", "criterion"])
@pytest.mark.parametrize("kind", ["reentrant", "saved_tensors", "saved_tensors_to_the_end"])
def test_activation_checkpointing_is_the_plain_call(name, kind, inside, with_ids):
    use_reentrant = kind == "reentrant"
    (model, criterion), (plain_model, plain) = ready(name, with_ids=with_ids), ready(name, with_ids=with_ids)
    trunk, head = model[:2], model[2]
    for step in (3, 4, 5):
        x, given = batch(step, with_ids)
        given["epoch"] = 3
        want, want_grads = evaluate(plain_model, plain, x, given)
        last, entering = (head, trunk) if inside == "head" else (nn.Identity(), model)
        with set_checkpoint_early_stop(kind != "saved_tensors_to_the_end"):
            loss = checkpoint(
                lambda h, given=given, last=last: criterion(last(h), **given), entering(x), use_reentrant=use_reentrant
            )
        model.zero_grad()
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        close((loss.detach(), grads), (want, want_grads))
        close(memory(criterion), memory(plain))
        for network_ in (model, plain_model):
            set_weights(network_, [p - 0.3 * g for p, g in zip(network_.parameters(), want_grads, strict=True)])
        if step == 4:
            criterion.step(), plain.step()


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@known_by(REMEMBERS)
def test_closures_of_lbfgs(name, by, search):
    model, criterion = ready(name, with_ids=by != "same_batch")
    oracle = copy.deepcopy(model)
    used = [criterion]

    def minimise(model, criterion_for, x, given):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn=search)

        def closure():
            optimizer.zero_grad()
            loss = criterion_for()(model(x), **given)
            loss.backward()
            return loss

        return optimizer.step(closure).detach()

    for step in (3, 4):
        x, given = batch(step, by != "same_batch")
        before = state_of(criterion)

        def anew(before=before):
            used.append(alike(criterion, oracle, before))
            return used[-1]

        with block(by, criterion):
            found = minimise(model, lambda: criterion, x, given)
        close(found, minimise(oracle, anew, x, given))
        close(list(model.parameters()), list(oracle.parameters()))
        close(memory(criterion), memory(used[-1]))
    assert len(used) > 4


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("steps", [0, 3])
def test_without_gradient_the_loss_is_the_same_and_nothing_changes(name, mode, steps):
    """Before, between and after the evaluations of a batch, and before the first batch of all."""
    model, criterion = ready(name, steps)
    plain_model, plain = ready(name, steps)
    x, given = batch(steps)
    if steps == 0 and isinstance(criterion, LastBatchLoss):
        x, given = x[4:], {k: v[4:] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    before, first = state_of(criterion), None
    with mode():
        first = criterion(model(x), **given)
        other, other_given = batch(17)
        criterion(model(other), **{**other_given, "ids": torch.arange(8)})
        model.eval()
        close(criterion(model(x), **given).clone(), first.clone())
        model.train()
    assert_same_bits(state_of(criterion), before)
    loss, grads = evaluate(model, criterion, x, given)
    want, want_grads = evaluate(plain_model, plain, x, given)
    close((first.clone(), loss, grads), (want, want, want_grads))
    assert_same_bits(state_of(criterion), state_of(plain))
    after = state_of(criterion)
    with mode():  # the batch is known by its ids
        close(criterion(model(x), **given).clone(), want)
    assert_same_bits(state_of(criterion), after)
    loss, grads = evaluate(model, criterion, x, given)
    close((loss, grads), (want, want_grads))
    close(memory(criterion), memory(plain))


def assert_same_bits(one, other):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        [assert_same_bits(one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        [assert_same_bits(a, b) for a, b in zip(one, other, strict=True)]
    else:
        assert one == other


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [n for n in ALL if n not in ("dlb", "two_view", "class_means")])
def test_a_batch_that_is_not_finite_does_not_reach_the_next(name, bad):
    """The good batch after it has the loss that it would have had without it."""
    model, criterion = ready(name)
    plain_model, plain = ready(name)
    x, given = batch(3)
    with torch.no_grad():
        z = torch.full_like(model(x), bad)
    criterion(z.requires_grad_(), **given)
    for step in (4, 5):
        x, given = batch(step)
        loss, grads = evaluate(model, criterion, x, given)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)
        if name != "mr_kd":  # whose ensemble learned from the labels of the bad batch
            close((loss, grads), evaluate(plain_model, plain, x, given))
            close(memory(criterion), memory(plain))


@pytest.mark.parametrize("name", ["dlb", "two_view"])
def test_after_a_batch_that_is_not_finite_the_criterion_is_cross_entropy_once(name):
    model, criterion = ready(name)
    x, given = batch(3)
    criterion(torch.full((ROWS, CLASSES), float("nan"), dtype=torch.float64, requires_grad=True), **given)
    x, given = batch(4)
    z = model(x)
    close(criterion(z, **given).detach(), F.cross_entropy(z, given["target"]).detach())
    x, given = batch(5)
    assert criterion(model(x), **given).isfinite() and (name == "two_view" or criterion.parts.lb > 0)


# ---- what one batch is


@pytest.mark.parametrize("name", REMEMBERS)
def test_a_nested_block_belongs_to_the_outer_and_errors_leave_it(name):
    model, criterion = ready(name)
    x, given = batch(3)
    before = state_of(criterion)
    want, _ = evaluate(model, alike(criterion, model, before), x, given)
    with pytest.raises(KeyError), criterion.same_batch(), criterion.same_batch():
        close(evaluate(model, criterion, x, given)[0], want)
        raise KeyError
    assert criterion._same is None
    criterion.load_state_dict(before)
    with criterion.same_batch():
        with criterion.same_batch():
            close(evaluate(model, criterion, x, given)[0], want)
        close(evaluate(model, criterion, x, given)[0], want)
    with criterion.same_batch():  # another block is another batch
        assert abs(evaluate(model, criterion, x, given)[0] - want) > 1e-6 or name == "dlb"


@pytest.mark.parametrize("name", ["mr_kd", "ps_kd", "elr", "class_means"])
@pytest.mark.parametrize("how", ["step", "epoch", "reset"])
def test_a_step_or_an_epoch_begins_a_new_batch_whatever_its_ids(name, how):
    """A set that is one batch has the same ids for ever; its teacher must not stay what it was at first."""
    model, criterion = ready(name)
    x, given = batch(0)
    losses = set()
    for epoch in range(3):
        given["epoch"] = epoch if how == "epoch" else 0
        anew = alike(criterion, model, state_of(criterion))
        loss, grads = evaluate(model, criterion, x, given)
        close((loss, grads), evaluate(model, anew, x, given))
        close(memory(criterion), memory(anew))
        losses.add(loss.item())
        if how == "step":
            DistillationLoss.step(criterion)  # without the copy that MrKD's takes
        elif how == "reset":
            criterion.reset()
    assert len(losses) > 1


def test_ps_kd_is_a_hand_written_loop_of_two_passes():
    model = network()
    criterion = PsKDLoss(2 * ROWS, CLASSES, alpha=0.8, epochs=4, memory_dtype=torch.float64)
    past = {}
    for step in range(5):
        x, given = batch(step)
        y, ids, given["epoch"] = given["target"], given["ids"].tolist(), step // 2
        teacher = torch.stack([past.get(i, F.one_hot(k, CLASSES).double()) for i, k in zip(ids, y, strict=True)])
        weights = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            loss, grads = evaluate(model, criterion, x, given)
            z = model(x)
            want = ps_kd.reference(z, y, teacher, alpha=0.8 * (step // 2 + 1) / 4)
            close((loss, grads), (want.detach(), torch.autograd.grad(want, list(model.parameters()))))
            set_weights(model, perturbed(model, grads))
        past |= zip(ids, z.detach().softmax(1), strict=True)
        set_weights(model, [w - 0.3 * g for w, g in zip(weights, grads, strict=True)])


def test_the_ensemble_of_mr_kd_takes_one_step_for_two_passes():
    model, criterion = ready("mr_kd")
    weight, bias = (t.clone().requires_grad_() for t in criterion._ensemble)
    x, given = batch(3)
    flat = criterion.snapshots.logits(x).transpose(0, 1).flatten(1)
    F.cross_entropy(flat @ weight.T + bias, given["target"]).backward()
    for _ in range(2):
        evaluate(model, criterion, x, given)
        close(criterion._ensemble, (weight.detach() - 0.1 * weight.grad, bias.detach() - 0.1 * bias.grad))


def test_a_batch_of_another_size_cannot_be_the_same_batch():
    model, criterion = ready("ps_kd")
    x, given = batch(3)
    with criterion.same_batch():
        evaluate(model, criterion, x, given)
        few = {k: v[:5] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with pytest.raises(ValueError, match="PsKDLoss: the same batch again must have its 8 rows, got 5; pass ids="):
            criterion(model(x[:5]), **few)
    criterion(model(x[:5]), **few)  # by ids it is a new one


@pytest.mark.parametrize("name", REMEMBERS)
def test_nothing_is_read_from_the_device_to_know_a_batch(name, monkeypatch):
    from test_criterion_calls import Seen

    monkeypatch.setattr(_args, "readable", lambda value: False)  # as on a GPU
    model, criterion = ready(name)
    x, given = batch(3)
    evaluate(model, criterion, x, given)
    z = model(x)
    with Seen() as seen:
        criterion(z, **given)
    reads = [op for op in seen.ops if any(word in op for word in ("_local_scalar", "aten.equal", "nonzero", "is_same"))]
    assert seen.ops and not reads


class Recalcitrant(ClassMeans):
    """Whose memory fails once."""

    fails = False

    def record(self, inputs):
        if self.fails:
            raise MemoryError("the method's own words")
        super().record(inputs)


def test_a_record_that_raises_is_heard_and_the_batch_is_not_taken_for_recorded():
    criterion, plain = Recalcitrant(), ClassMeans()
    model = network()
    for one in (criterion, plain):
        evaluate(model, one, *batch(0))
    criterion.fails = True
    with pytest.raises(MemoryError, match="the method's own words"):
        criterion(model(batch(1)[0]), **batch(1)[1])
    criterion.fails = False
    for step in (1, 1, 2):
        close(evaluate(model, criterion, *batch(step)), evaluate(model, plain, *batch(step)))


# ---- teaching that cannot be


def test_mr_kd_without_setup_is_refused_at_the_first_batch():
    with pytest.raises(RuntimeError, match=r"call criterion.setup\(model\) once before training"):
        MrKDLoss()(torch.zeros(2, 3), torch.tensor([0, 1]), images=torch.zeros(2, 4))


def test_mr_kd_without_steps_warns_once():
    model = nn.Linear(2, 3)
    criterion = MrKDLoss()
    criterion.setup(model)
    x, y = torch.zeros(2, 2), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match=r"MrKDLoss: 100 batches and no criterion.step\(\)") as found:
        for _ in range(250):
            criterion(model(x), y, images=x)
    assert len(found) == 1


def test_a_set_that_is_one_batch_is_warned_of_once():
    criterion = PsKDLoss(2, 3)
    z, y, ids = torch.zeros(2, 3), torch.tensor([0, 1]), torch.arange(2)
    with pytest.warns(UserWarning, match=r"PsKDLoss: the ids were the same 100 times.*criterion.step\(\)") as found:
        for _ in range(250):
            criterion(z, y, ids)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            criterion(z, y, ids)
            criterion.step()


def test_bake_hears_of_a_layer_that_no_forward_reaches():
    model = network()
    criterion = BakeLoss()
    with pytest.raises(RuntimeError, match=r"call criterion.setup\(model\) once, or pass features="):
        criterion(model(batch(0)[0]), batch(0)[1]["target"])
    criterion.setup(model)
    model[2] = nn.Linear(6, CLASSES).double()
    with pytest.raises(RuntimeError, match=r"no forward in training mode.*call setup\(model\) again"):
        criterion(model(batch(0)[0]), batch(0)[1]["target"])


# ---- rows that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ps_kd_keeps_the_row_it_had(bad):
    criterion = PsKDLoss(4, 3, alpha=0.5)
    z, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    criterion(z[:2], y[:2], torch.tensor([0, 1]))
    z[0, 2] = z[2, 1] = bad
    criterion(z[[0, 2, 3]], y[[0, 2, 3]], torch.tensor([0, 2, 3]))
    rows, seen = criterion.bank.rows(torch.arange(4), "cpu")
    assert seen.tolist() == [True, True, False, True] and rows.isfinite().all()
    state = criterion.state_dict()
    state["_extra_state"][1, 2] = bad  # saved by a bank that took everything
    criterion.load_state_dict(state)
    assert criterion.bank.rows(torch.arange(4), "cpu")[1].tolist() == [True, False, False, True]
    assert dlb_fast.ps_kd_loss(torch.zeros(2, 3), y[:2], torch.tensor([[0.2, bad, 0.1], [0.2, 0.3, 0.5]])).isfinite()


@pytest.mark.parametrize("options", [{}, {"swap": True}, {"correct_share": 0.9}])
def test_a_copy_of_mr_kd_that_is_not_finite_does_not_teach(options):
    g = torch.Generator().manual_seed(0)
    copies, y = torch.randn(3, 4, 5, generator=g), torch.tensor([0, 1, 2, 3])
    want = mr_kd.average(copies[[0, 2]], y, 2.0, **options)
    copies[1] = float("nan")
    torch.testing.assert_close(mr_kd.average(copies, y, 2.0, **options), want)
    copies[:, 2] = float("inf")
    assert mr_kd.average(copies, y, 2.0, **options)[2].isnan().all()
    loss = dlb_fast.mr_kd_loss(torch.zeros(4, 5), y, copies, **options)
    assert loss.isfinite()


def test_weights_that_are_not_finite_do_not_reach_the_ensemble_of_mr_kd():
    model, criterion = ready("mr_kd")
    x, given = batch(3)
    good = [p.detach().clone() for p in model.parameters()]
    set_weights(model, [torch.full_like(p, float("nan")) for p in good])
    criterion.step()
    set_weights(model, good)
    ensemble = [t.clone() for t in criterion._ensemble]
    loss, _ = evaluate(model, criterion, x, given)
    want = 0.5 * F.cross_entropy(model(x), given["target"])
    close(loss, want.detach())
    close(list(criterion._ensemble), ensemble)
    criterion.step(), criterion.step()  # the copy is out of the ring
    evaluate(model, criterion, *batch(4))
    assert criterion.parts.lb > 0


@pytest.mark.parametrize("where", ["features", "logits"])
def test_a_row_of_bake_that_is_not_finite_is_left_out(where):
    g = torch.Generator().manual_seed(0)
    z, f, y = torch.randn(6, 4, generator=g), torch.randn(6, 3, generator=g), torch.arange(6) % 4
    want = bake.ensemble(f[1:], z[1:], 4.0)
    (f if where == "features" else z)[0, 1] = float("nan")
    found = bake.ensemble(f, z, 4.0)
    torch.testing.assert_close(found[1:], want)
    assert found[0].isnan().all()
    y[0] = -100
    z[0] = 0.0
    loss = dlb_fast.bake_loss(z, f, y)
    assert loss.isfinite()


def test_a_partner_of_cs_kd_that_is_not_finite_does_not_teach():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(6, 4, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])
    mask = torch.tensor([True, False, True, True, True, True])
    want = dlb_fast.CsKDLoss()(z, y, kd_mask=mask)
    z[4, 0] = float("nan")
    torch.testing.assert_close(dlb_fast.CsKDLoss()(z, y), want)


# ---- options


@pytest.mark.parametrize("name", SIBLINGS)
def test_an_option_that_is_set_later_counts_like_one_that_is_given(name):
    options = {**({"alpha": 0.3} if takes(name, "alpha") else {}), **CASES[name].settings[-1]}
    (model, given), (other, later) = ready(name, **options), ready(name)
    set_weights(other, model.parameters())
    later.load_state_dict(given.state_dict())
    for option, value in options.items():
        assert getattr(given, option) == value != getattr(later, option)
        setattr(later, option, value)
    x, inputs = batch(3)
    close(evaluate(other, later, x, inputs), evaluate(model, given, x, inputs))
    assert repr(later) == repr(given)


# ---- what a criterion shows of itself

SHOWN = {
    "ce": ({"label_smoothing": 0.1}, "CrossEntropy(label_smoothing=0.1)"),
    "lsr_kd": ({"correct_share": 0.9}, "LsrKDLoss(alpha=0.1, temperature=3.0, correct_share=0.9)"),
    "tf_kd_reg": ({"temperature": 40.0}, "TfKDRegLoss(num_classes=5, alpha=0.1, temperature=40.0)"),
    "mr_kd": (
        {"copy_every": 9, "memory_dtype": torch.bfloat16, "swap": True},
        "MrKDLoss(alpha=0.5, temperature=3.0, copy_every=9, memory_dtype=torch.bfloat16, swap=True, ensemble_lr=0.1)",
    ),
    "bake": ({"omega": 0.9, "layer": "2"}, "BakeLoss(alpha=1.0, temperature=4.0, omega=0.9, layer='2')"),
    "cs_kd": ({"weight": torch.ones(5)}, "CsKDLoss(alpha=1.0, temperature=4.0, weight=Tensor(5,))"),
    "ddgsd": ({"ce_weight": 0.5}, "DdgsdLoss(alpha=1.0, temperature=4.0, ce_weight=0.5)"),
    "ps_kd": (
        {"cross_rank": False, "alpha": torch.tensor(0.25)},
        "PsKDLoss(num_samples=8, num_classes=5, alpha=tensor(0.2500), epochs=4, cross_rank=False)",
    ),
    "zipf": ({"power": 2.0, "impl": "torch"}, "ZipfLoss(alpha=0.1, power=2.0, impl='torch')"),
    "gce": ({"q": 0.5}, "GceLoss(q=0.5)"),
    "sce": ({"beta": 0.1, "alpha": 6.0}, "SceLoss(alpha=6.0, beta=0.1)"),
    "elr": (
        {"memory_device": "cpu", "beta": 0.9},
        "ElrLoss(num_samples=8, num_classes=5, alpha=3.0, beta=0.9, memory_device=device(type='cpu'))",
    ),
    "r_drop": ({"reduction": "none"}, "RDropLoss(alpha=0.6, reduction='none')"),
    "dlb": (
        {"capacity": 3, "dtype": torch.float16, "ignore_index": 255},
        "LastBatchLoss(num_classes=5, capacity=3, dtype=torch.float16, alpha=1.0, temperature=3.0, ignore_index=255)",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_criterion_shows_what_is_not_at_its_default(name):
    options, text = SHOWN[name]
    criterion = make(name, **options)
    assert repr(criterion) == text
    criterion.reduction = "sum"
    assert "reduction='sum'" in repr(criterion) and repr(pickle.loads(pickle.dumps(criterion))) == repr(criterion)


def test_options_that_are_passed_on_are_shown():
    class Passing(DistillationLoss):
        def __init__(self, share=0.5, **options):
            super().__init__(**options)
            self.share = share

    assert repr(Passing(0.7, ce_alpha=-0.5)) == "Passing(alpha=1.0, temperature=1.0, ce_alpha=-0.5, share=0.7)"
    assert repr(ClassMeans(label_smoothing=0.1)) == "ClassMeans(alpha=1.0, temperature=1.0, label_smoothing=0.1)"
    assert sorted(SHOWN) == sorted(set(CASES) - {"two_view"})


# ---- compiled


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_ps_kd_compiled_knows_a_batch_by_its_ids(impl):
    compiled, plain = (PsKDLoss(2 * ROWS, CLASSES, alpha=0.8, memory_dtype=torch.float64, impl=impl) for _ in range(2))
    call = torch.compile(lambda *args: compiled(*args), fullgraph=True, backend="aot_eager")
    model = network()
    for step in (0, 0, 1, 1, 2, 2, 0):
        x, given = batch(step)
        z = model(x + torch.randn_like(x)).detach()
        results = []
        for criterion in (call, plain):
            leaf = z.clone().requires_grad_()
            loss = criterion(leaf, given["target"], given["ids"])
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        close(*results)
        close(memory(compiled), memory(plain))
