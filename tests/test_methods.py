"""Every method of the registry: function and module against its definition, its defaults, its errors, its card."""

from __future__ import annotations

import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from method_cases import CASES, CLASSES, SIBLINGS, function_of, make, module_of, takes
from torch import nn

import dlb_fast
from dlb_fast import DistillationLoss, Teacher, _backends
from dlb_fast.methods import METHODS, Method, Option, bake, mr_kd, register, tf_kd
from dlb_fast.presets import PRESETS
from dlb_fast.train.config import METHOD_FIELDS, LossConfig, RunConfig, to_dict
from dlb_fast.train.methods import method_options

ROWS, COLUMNS = 12, 17
ROOT = Path(__file__).parents[1]


def graded(function, z, upstream=1.7):
    z = z.detach().clone().requires_grad_()
    loss = function(z)
    (loss * upstream).backward()
    return loss.detach().double().cpu(), z.grad.double().cpu()


def problem(name, generator, rows=ROWS, columns=COLUMNS):
    """Logits and extras in float64, and labels, on the CPU."""
    z = 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")
    y = torch.randint(0, columns, (rows,), generator=generator, device="cpu")
    return z, y, CASES[name].extras(z, generator)


def check_definition(name, settings, impl, dtype, generator, rows=ROWS, columns=COLUMNS):
    z, y, extras = problem(name, generator, rows, columns)
    device = device_of(impl)
    z, given = z.to(dtype), {k: v.to(dtype) for k, v in extras.items()}
    exact, here = {k: v.double() for k, v in given.items()}, {k: v.to(device) for k, v in given.items()}
    function, reference = function_of(name), module_of(name).reference
    loss, grad = graded(lambda v: function(v, target=y.to(device), impl=impl, **here, **settings), z.to(device))
    true_loss, true_grad = graded(lambda v: reference(v, target=y, **exact, **settings), z.double())
    value, gradient = {torch.float64: (1e-11, 1e-11), torch.float32: (2e-5, 4e-6), torch.bfloat16: (2e-4, 1e-2)}[dtype]
    assert loss.item() == pytest.approx(true_loss.item(), rel=value)
    # The difference of two probabilities is computed in float32 for 16-bit inputs too: what is left is one rounding.
    assert (grad - true_grad).abs().max() <= gradient * true_grad.abs().max()


@pytest.mark.parametrize(("name", "settings"), [(n, s) for n in SIBLINGS for s in CASES[n].settings], ids=str)
def test_function_equals_definition(impl, generator, name, settings):
    check_definition(name, settings, impl, torch.float32, generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SIBLINGS)
def test_function_equals_definition_in_other_dtypes(impl, generator, name, dtype):
    if impl == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels refuse float64")
    check_definition(name, CASES[name].settings[-1], impl, dtype, generator)


@pytest.mark.parametrize("name", SIBLINGS)
def test_triton_equals_definition(generator, name):
    """Small, because without a GPU it runs in Triton's interpreter."""
    known = _backends.implementations()["triton"]
    if not known.available:
        pytest.skip(known.reason)
    check_definition(name, CASES[name].settings[-1], "triton", torch.float32, generator, rows=4, columns=7)


def batch(name, model, seed=0):
    """A batch of 8 rows for the module of a method, by keyword."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 7, generator=g), torch.randint(0, CLASSES, (8,), generator=g)
    return {"logits": model(x), "target": y, "ids": torch.arange(8), "images": x, "epoch": seed}


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))


def ready(name, **options):
    """A model and the method's criterion after two steps, so that its teacher has something to say."""
    model, criterion = network(), make(name, **options)
    criterion.setup(model)
    for seed in range(2):
        criterion(**batch(name, model, seed))
        criterion.step()
    return model, criterion


@pytest.mark.parametrize("name", SIBLINGS)
def test_reductions_options_and_parts(impl, generator, name):
    """sum and none agree with mean; class weights reach the CE only; a label outside the classes is refused."""
    device = device_of(impl)
    z, y, extras = problem(name, generator)
    z, y = z.float().to(device), y.to(device)
    given = {k: v.float().to(device) for k, v in extras.items()} | CASES[name].settings[-1]
    call = lambda **more: function_of(name)(z, target=y, impl=impl, return_parts=True, **given, **more)  # noqa: E731
    (mean, parts), (total, _), (rows, _) = call(), call(reduction="sum"), call(reduction="none")
    assert rows.shape == (ROWS,)
    torch.testing.assert_close(rows.sum(), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.mean(), mean, rtol=1e-5, atol=1e-5)
    assert parts.loss.item() == pytest.approx(mean.item(), rel=1e-6)
    assert parts.ce.item() == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    assert parts.correct.item() == (z.argmax(1) == y).sum().item()
    weight = torch.rand(COLUMNS, generator=generator).to(device)
    smoothing = {"label_smoothing": 0.1} if takes(name, "label_smoothing") else {}
    weighted, weighted_parts = call(weight=weight, **smoothing)
    wanted = F.cross_entropy(z, y, weight=weight, **smoothing)
    assert weighted_parts.ce.item() == pytest.approx(wanted.item(), rel=1e-5)
    if name != "gce":  # which is one term
        assert weighted_parts.lb.item() == pytest.approx(parts.lb.item(), rel=1e-5)
    assert weighted.item() != pytest.approx(mean.item(), rel=1e-4)
    if device == "cpu":
        y[3] = COLUMNS
        with pytest.raises(ValueError, match=f"{function_of(name).__name__}.*is not a class"):
            call()


@pytest.mark.parametrize("name", [n for n in SIBLINGS if takes(n, "kd_mask")])
def test_kd_mask_takes_rows_out_of_the_kl(impl, generator, name):
    z, y, extras = problem(name, generator)
    device = device_of(impl)
    z, y, mask = z.float().to(device), y.to(device), (torch.arange(ROWS, device=device) % 3 > 0)
    given = {k: v.float().to(device) for k, v in extras.items()}
    function = function_of(name)
    rows = lambda **more: function(z, target=y, impl=impl, reduction="none", **given, **more)  # noqa: E731
    without, masked, all_rows = rows(alpha=0.0), rows(kd_mask=mask), rows()
    torch.testing.assert_close(masked[mask], all_rows[mask])
    _, none = function(z, target=y, impl=impl, return_parts=True, kd_mask=torch.zeros_like(mask), **given)
    assert none.lb == 0 and (masked[~mask] != all_rows[~mask]).any() and without.shape == (ROWS,)


@pytest.mark.parametrize("name", [n for n in SIBLINGS if n not in ("tf_kd_reg", "ddgsd") and takes(n, "alpha")])
def test_alpha_as_a_device_scalar(impl, generator, name):
    z, y, extras = problem(name, generator)
    z, y = z.float().to(device_of(impl)), y.to(device_of(impl))
    given = {k: v.to(z) for k, v in extras.items()}
    number = function_of(name)(z, target=y, impl=impl, alpha=0.3, **given)
    tensor = function_of(name)(z, target=y, impl=impl, alpha=torch.tensor(0.3, device=z.device), **given)
    assert tensor.item() == pytest.approx(number.item(), rel=1e-6)


# ---- the registry, and one place for every default


def default_of(signature, name):
    value = signature.parameters[name].default
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_one_default(name):
    """Function, module, definition, registry and trainer agree, and so does the table of the card."""
    method = METHODS[name]
    module = inspect.signature(method.criterion)
    trained = method_options(LossConfig(method=name))
    assert list(trained) == list(method.options)
    signatures = [module]
    if (function := function_of(name)) is not None:
        signatures += [inspect.signature(function), inspect.signature(module_of(name).reference)]
    elif name == "dlb":
        signatures += [inspect.signature(dlb_fast.fused_lb_loss), inspect.signature(dlb_fast.dlb_step)]
    for option, value in trained.items():
        found = {default_of(s, option) for s in signatures if option in s.parameters}
        if not found and "options" in module.parameters:  # passed on to the base
            found = {default_of(inspect.signature(DistillationLoss), option)}
        assert found == {value} or (not found and option in method.batch_options), option
        documented = option in ("alpha", "temperature") or method.options[option].help
        assert documented, f"{option} has no text in the docstring of {method.criterion.__name__}"
        assert option in METHOD_FIELDS
    for option in ("label_smoothing", "ignore_index", "reduction", "impl"):  # those of every criterion are torch's
        wanted = {"label_smoothing": 0.0, "ignore_index": -100, "reduction": "mean", "impl": "auto"}[option]
        found = {default_of(s, option) for s in signatures if option in s.parameters}
        assert found == {wanted} or (not found and ("options" in module.parameters or name == "gce"))
    if name in ("ce", "two_view"):
        return
    text = (ROOT / "docs" / "methods" / f"{method.card}.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.M))
    shown = {option: f"{value:g}" if isinstance(value, float) else str(value) for option, value in trained.items()}
    assert table == shown


@pytest.mark.parametrize("name", METHODS)
def test_a_misspelt_option_is_refused_in_the_name_that_was_called(name):
    criterion = METHODS[name].criterion
    passed_on = "options" in inspect.signature(criterion).parameters
    with pytest.raises(TypeError, match=rf"({criterion.__name__}{'|DistillationLoss' * passed_on}).*'temprature'"):
        make(name, temprature=2.0)
    if (function := function_of(name)) is not None:
        z, y, extras = problem(name, torch.Generator().manual_seed(0))
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got .* argument 'temprature'"):
            function(z, target=y, temprature=2.0, **extras)


@pytest.mark.parametrize("name", METHODS)
def test_eval_is_torchs_cross_entropy_with_the_same_options(name):
    weight = torch.rand(CLASSES, generator=torch.Generator().manual_seed(1))
    smoothing = {"label_smoothing": 0.2} if "label_smoothing" in METHODS[name].arguments else {}
    model, criterion = ready(name, **smoothing, weight=weight, ignore_index=2)
    criterion.eval()
    z, y = model(torch.randn(9, 7)), torch.arange(9) % CLASSES
    wanted = F.cross_entropy(z, y, **smoothing, weight=weight, ignore_index=2)
    assert criterion(z, y).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert criterion.parts.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    with pytest.raises(ValueError, match=f"{type(criterion).__name__}: target is None in eval"):
        criterion(z, None)


@pytest.mark.parametrize("name", METHODS)
def test_the_mixup_pair_form_is_the_dense_target_or_refused(name):
    """One class per image is what a few teachers need; they say so, and nobody drops the second label in silence."""
    (model, criterion), (_, other) = ready(name), ready(name)
    if name == "mr_kd":
        criterion.ensemble_lr = other.ensemble_lr = None
    given = batch(name, model, seed=5)
    y, second, lam = given.pop("target"), torch.randint(0, CLASSES, (8,)), torch.rand(8)
    dense = lam[:, None] * F.one_hot(y, CLASSES) + (1 - lam[:, None]) * F.one_hot(second, CLASSES)
    try:
        loss = criterion(target=y, target_b=second, lam=lam, **given)
    except ValueError as error:
        assert not METHODS[name].mixes and "one class per row" in str(error)
        return
    model[0].eval()
    if name == "bake":  # each forward's features are taken once
        other.hook._features = criterion_features = model[:3](given["images"]).detach()
        assert criterion_features.shape == (8, 6)
    assert loss.item() == pytest.approx(other(target=dense, **given).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [("lsr_kd", {"correct_share": 0.9}), ("mr_kd", {"swap": True}), ("mr_kd", {"correct_share": 0.9}), ("mr_kd", {})],
)
def test_options_that_need_one_class_refuse_mixed_images(name, options):
    model, criterion = ready(name, **options)
    given = batch(name, model)
    assert criterion(**given).isfinite()
    with pytest.raises(ValueError, match="one class per row"):
        criterion(**given, target_b=given["target"], lam=0.5)
    assert {*options} <= {*METHODS[name].one_class}


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_method_is_known_to_its_own_file_and_the_face_only(name):
    criterion = METHODS[name].criterion.__name__
    files = [p.relative_to(ROOT).as_posix() for p in (ROOT / "dlb_fast").rglob("*.py") if criterion in p.read_text()]
    own = module_of(name).__name__.replace(".", "/") + ".py"
    assert {own} <= {*files} <= {own, "dlb_fast/__init__.py"}


def test_registering_twice_or_wrongly_is_refused():
    with pytest.raises(ValueError, match="there is a method 'bake' already"):
        register(METHODS["bake"])
    with pytest.raises(ValueError, match="batches must be one of samples, overlap, same_class, two_views"):
        Method("x", DistillationLoss, "x", batches="pairs")


def test_a_method_passes_options_on_to_its_base():
    class Passing(DistillationLoss):
        """One line.

        Args:
            sharpness: two lines
                of text.
        """

        def __init__(self, sharpness: float = 2.0, **options) -> None:
            super().__init__(**options)

    method = Method("passing", Passing, "x")
    assert method.options["sharpness"] == Option(2.0, float, "two lines of text.")
    assert {"alpha", "temperature", "ce_weight", "ce_alpha", "sharpness"} == set(method.options)


# ---- the general form


def test_distillation_loss_is_every_kind(impl, generator):
    z = (2 * torch.randn(6, 5, generator=generator)).to(device_of(impl))
    t = torch.randn(4, 5, generator=generator).to(z)
    y = torch.arange(6, device=z.device) % 5
    general = lambda *args, **kwargs: dlb_fast.distillation_loss(z, y, *args, impl=impl, **kwargs)  # noqa: E731
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
    same(general(t, temperature=2.0), dlb_fast.fused_lb_loss(z, y, t, temperature=2.0, impl=impl))
    probabilities = torch.softmax(t / 2.0, 1)
    same(general(probabilities, kind="probabilities", temperature=2.0), general(t, temperature=2.0))
    uniform = general(kind="uniform", alpha=0.2, ce_alpha=-1.0, temperature=2.0)
    same(uniform, dlb_fast.lsr_kd_loss(z, y, alpha=0.2, temperature=2.0, impl=impl))
    same(general(), F.cross_entropy(z, y))
    loss, parts = general(t, kd_mask=torch.zeros(6, dtype=torch.bool, device=z.device), return_parts=True)
    assert parts.lb == 0 and loss == parts.ce


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hidden"}, "kind must be 'logits', 'probabilities', 'top_k' or 'uniform', got 'hidden'"),
        ({"kind": "uniform", "teacher": torch.zeros(4, 5)}, "teacher must be None with kind='uniform'"),
        ({"correct_share": 0.5}, "correct_share belongs to kind='uniform', got kind='logits'"),
        ({"kind": "uniform", "correct_share": 1.5}, "correct_share must be None"),
        ({"kind": "uniform", "alpha": 2.0, "ce_alpha": -1.0}, "alpha must be at most 1"),
        ({"kind": "uniform", "ce_weight": -1.0}, "ce_weight must be finite and >= 0.*got -1"),
        ({"kind": "uniform", "ce_alpha": float("nan")}, "ce_alpha must be finite.*got nan"),
        ({"kd_mask": torch.ones(4).bool()}, "kd_mask was given without a teacher"),
        ({"teacher": torch.zeros(4, 4)}, "distillation_loss: "),
        ({"kind": "uniform", "kd_mask": torch.ones(3).bool()}, "kd_mask must be a bool"),
        ({"target_b": torch.zeros(4).long()}, "the mixup pair form needs"),
    ],
)
def test_distillation_loss_names_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        dlb_fast.distillation_loss(torch.zeros(4, 5), torch.arange(4), **options)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (torch.zeros(4, 5), "teacher.inputs. must return a dlb_fast.Teacher, got Tensor"),
        (Teacher("probs", torch.zeros(4, 5)), "one of logits, probabilities, top_k, uniform, none, got 'probs'"),
        (Teacher("logits"), "kind 'logits' needs a tensor"),
        (Teacher("none", torch.zeros(4, 5)), "kind 'none' takes no tensor"),
        (Teacher("logits", torch.zeros(4, 5), correct_share=0.9), "correct_share belongs to a teacher of kind 'unif"),
        (Teacher("logits", torch.zeros(4, 5), add_entropy=True), "add_entropy belongs to a teacher of kind 'prob"),
        (Teacher("uniform", mask=torch.ones(2).bool()), r"the teacher's mask must be a bool tensor of shape \(4,\)"),
        (Teacher("logits", torch.zeros(4, 5), rows=9), "rows must be at most the 4 rows of the batch, got 9"),
        (Teacher("logits", torch.zeros(4, 5), rows=-1), "the teacher's rows must be at least 0, got -1"),
        (Teacher("logits", torch.zeros(2, 5), rows=2.0), "the teacher's rows must be an integer, got 2.0"),
        (Teacher("logits", torch.zeros(4, 5), rows=2), r"teacher must have shape \(H, C\) with H <= 2"),
        (Teacher("logits", torch.zeros(5, 5)), r"teacher must have shape \(H, C\) with H <= 4"),
        (Teacher("logits", torch.zeros(4, 5).long()), "teacher must be floating point, got torch.int64"),
        (Teacher("logits", [[0.0] * 5] * 4), "teacher must be a torch.Tensor, got list"),
        (Teacher("logits", torch.zeros(4, 5, device="meta")), "teacher must be on the device of the log"),
        (Teacher("logits", torch.zeros(4, 5), mask=torch.ones(4)), "the teacher's mask must be a bool tensor"),
        (Teacher("logits", torch.zeros(2, 5), mask=torch.ones(4).bool()), r"mask must be a bool .* shape \(2,\)"),
        (Teacher("none", mask=torch.ones(4).bool()), "kind 'none' has no KL, so it takes no mask and no student"),
        (Teacher("none", student=torch.zeros(4, 5)), "kind 'none' has no KL, so it takes no mask and no student"),
        (Teacher("uniform", student=torch.zeros(2, 5)), "student must be floating with the shape of the l"),
        (Teacher("uniform", student=torch.zeros(4, 5)), "must be made of the logits with their graph.*do not detach"),
        (Teacher("uniform", kl_weight=0.0), "the teacher's kl_weight must be finite and > 0, got 0.0"),
        (Teacher("uniform", kl_weight=float("nan")), "the teacher's kl_weight must be finite and > 0, got nan"),
        (Teacher("uniform", kl_weight=torch.tensor(1.0)), "the teacher's kl_weight must be a number, got Tensor"),
        (Teacher("uniform", alpha_scale=-1.0), "the teacher's alpha_scale must be finite and >= 0, got -1"),
        (Teacher(0, torch.zeros(4, 5)), "kind must be one of logits, probabilities, top_k, uniform, none, got 0"),
    ],
)
def test_a_teacher_whose_fields_do_not_fit_is_refused(impl, teacher, message):
    class Wrong(DistillationLoss):
        def teacher(self, inputs):
            return teacher

    with pytest.raises((ValueError, TypeError), match=f"Wrong: .*{message}"):
        Wrong(impl=impl)(torch.zeros(4, 5, requires_grad=True), torch.arange(4))


def test_a_method_without_a_teacher_says_so():
    with pytest.raises(NotImplementedError, match=r"a method must define teacher\(inputs\) -> Teacher"):
        DistillationLoss()(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="DistillationLoss.parts: there are none before the first call"):
        _ = DistillationLoss().parts


# ---- what single methods promise


@pytest.mark.parametrize("epsilon", [0.1, 0.35])
def test_label_smoothing_is_lsr_kd_at_temperature_one(impl, generator, epsilon):
    z = (3 * torch.randn(ROWS, COLUMNS, generator=generator)).to(device_of(impl))
    y = torch.randint(0, COLUMNS, (ROWS,), generator=generator).to(z.device)
    ours = graded(lambda v: dlb_fast.lsr_kd_loss(v, y, alpha=epsilon, temperature=1.0, impl=impl), z)
    smooth = graded(lambda v: F.cross_entropy(v, y, label_smoothing=epsilon), z)
    assert ours[0].item() + epsilon * math.log(COLUMNS) == pytest.approx(smooth[0].item(), rel=1e-5)
    torch.testing.assert_close(ours[1], smooth[1], rtol=1e-4, atol=1e-6)


def test_lsr_kd_at_a_large_temperature_is_the_logit_variance_penalty(impl, generator):
    if impl == "cuda":
        pytest.skip("the CUDA kernels refuse float64")
    z = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64).to(device_of(impl))
    y = torch.zeros(ROWS, dtype=torch.int64, device=z.device)
    kl = dlb_fast.lsr_kd_loss(z, y, alpha=1.0, temperature=1000.0, impl=impl)
    assert kl.item() == pytest.approx(0.5 * z.var(1, correction=0).mean().item(), rel=5e-3)


def test_lsr_kd_with_a_uniform_share_has_no_correction(impl, generator):
    z = torch.randn(ROWS, COLUMNS, generator=generator).to(device_of(impl))
    y = torch.randint(0, COLUMNS, (ROWS,), generator=generator).to(z.device)
    plain = dlb_fast.lsr_kd_loss(z, y, impl=impl)
    corrected = dlb_fast.lsr_kd_loss(z, y, correct_share=1 / COLUMNS, impl=impl)
    assert corrected.item() == pytest.approx(plain.item(), rel=1e-5)


def test_tf_kd_at_its_defaults_is_nearly_label_smoothing(generator):
    """C = 100, T = 20, multiplier 100: 0.9 CE + 0.1 KL(nearly uniform || p)."""
    z, y = torch.randn(8, 100, generator=generator), torch.randint(0, 100, (8,), generator=generator)
    smooth = dlb_fast.lsr_kd_loss(z, y, alpha=0.1, temperature=1.0)
    assert dlb_fast.tf_kd_reg_loss(z, y).item() == pytest.approx(smooth.item(), rel=2e-3)


def test_tf_kd_share_at_any_temperature():
    """The softmax of (share, rest, rest, ...) / temperature, also where its exponentials overflow."""
    for temperature in (1e-4, 1e-2, 1.0, 40.0):
        virtual = torch.tensor([0.99, *[0.01 / 4] * 4], dtype=torch.float64)
        wanted = torch.softmax(virtual / temperature, 0)[0].item()
        assert tf_kd.softened_share(5, temperature, 0.99) == pytest.approx(wanted, rel=1e-12)


def test_ps_kd_by_hand():
    """Two classes, by paper and pencil: target (0.6, 0.4) against p = (0.5, 0.5) costs log 2."""
    loss = dlb_fast.ps_kd_loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[0.2, 0.8]]), alpha=0.5)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    seen = torch.tensor([[1.0, 3.0]])
    p = torch.softmax(seen, 1)[0]
    wanted = -(0.6 * p[0].log() + 0.4 * p[1].log())
    loss = dlb_fast.ps_kd_loss(seen, torch.tensor([0]), torch.tensor([[0.2, 0.8]]), alpha=0.5)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_ps_kd_takes_dense_targets_and_none():
    z, past = torch.randn(3, 4), torch.softmax(torch.randn(3, 4), 1)
    y = torch.tensor([0, 3, 2])
    labels = dlb_fast.ps_kd_loss(z, y, past)
    torch.testing.assert_close(dlb_fast.ps_kd_loss(z, torch.eye(4)[y], past), labels)
    torch.testing.assert_close(dlb_fast.ps_kd_loss(z, y, past, target_b=y.flip(0), lam=1.0), labels)
    _, parts = dlb_fast.ps_kd_loss(z, None, past, return_parts=True)
    assert parts.ce == 0 and parts.lb > 0


@pytest.mark.parametrize("second", [False, True], ids=["labels", "pair"])
def test_ps_kd_leaves_ignored_labels_out(second):
    z, y, past = torch.randn(3, 4), torch.tensor([0, -100, 2]), torch.softmax(torch.randn(3, 4), 1)
    pair = {"target_b": y, "lam": 0.3} if second else {}
    mine = torch.tensor([0, 1, 2]) if second else y
    _, both = dlb_fast.ps_kd_loss(z, mine, past, return_parts=True, **pair)
    kept = [0, 2]
    pair = {"target_b": y[kept], "lam": 0.3} if second else {}
    _, alone = dlb_fast.ps_kd_loss(z[kept], mine[kept], past[kept], return_parts=True, **pair)
    torch.testing.assert_close(both[:3], alone[:3])


def test_zipf_counts_the_right_class_and_shares_ties(impl):
    """z = (4, 3, 3, 1), y = 0: ranks of the others 2, 2, 4."""
    z, y = torch.tensor([[4.0, 3.0, 3.0, 1.0]], device=device_of(impl)), torch.tensor([0], device=device_of(impl))
    q = torch.tensor([1 / 2, 1 / 2, 1 / 4], dtype=torch.float64, device="cpu")
    q = q / q.sum()
    kl = (q * (q.log() - torch.log_softmax(z[0, 1:].double().cpu(), 0))).sum()
    loss, parts = dlb_fast.zipf_loss(z, y, alpha=1.0, impl=impl, return_parts=True)
    assert parts.lb.item() == pytest.approx(kl.item(), rel=1e-5)
    assert loss.item() == pytest.approx(parts.ce.item() + kl.item(), rel=1e-5)


def test_zipf_with_a_large_power_teaches_the_best_wrong_class():
    z, y = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([0])
    _, parts = dlb_fast.zipf_loss(z, y, power=200.0, return_parts=True)
    assert abs(parts.lb.item() - F.cross_entropy(z[:, 1:], torch.tensor([0])).item()) < 1e-6


def test_zipf_gives_ignored_rows_no_gradient(impl, generator):
    z = torch.randn(4, 5, generator=generator).to(device_of(impl)).requires_grad_()
    dlb_fast.zipf_loss(z, torch.tensor([1, -100, 2, 3], device=z.device), impl=impl).backward()
    assert z.grad[1].abs().sum() == 0 and z.grad[0].abs().sum() > 0


def test_mr_kd_swap_leaves_right_answers_alone(generator):
    z = torch.randn(2, 6, 5, generator=generator)
    right = z.sum(0).argmax(1)
    teacher = mr_kd.average(z, right, 1.0, swap=True)
    assert (teacher.argmax(1) == right).all()  # in every copy the right class is now the largest
    agreeing = torch.stack([z[0], z[0]])
    torch.testing.assert_close(mr_kd.average(agreeing, z[0].argmax(1), 2.0, swap=True), torch.softmax(z[0] / 2.0, 1))


def test_mr_kd_correction_of_a_certain_copy_stays_finite():
    teacher = mr_kd.average(torch.tensor([[[0.0, 2000.0, 0.0]]]), torch.tensor([1]), 1.0, correct_share=0.8)
    torch.testing.assert_close(teacher, torch.tensor([[0.1, 0.8, 0.1]]))


@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_mr_kd_does_not_adjust_ignored_rows(generator, ignore_index):
    z, y = torch.randn(4, 5, generator=generator), torch.tensor([1, ignore_index, 2, 3])
    teacher = mr_kd.average(z[None], y, 1.0, swap=True, correct_share=0.7, ignore_index=ignore_index)
    torch.testing.assert_close(teacher[1], torch.softmax(z[1], 0))
    assert teacher[0, 1].item() == pytest.approx(0.7)


def test_bake_targets_are_distributions_and_float32_under_autocast(generator):
    z, f = torch.randn(10, 4, generator=generator), torch.randn(10, 7, generator=generator)
    wanted = bake.reference_teacher(f, z, temperature=4.0, omega=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = bake.ensemble(f, z, 4.0, 0.5)
        assert (f @ f.T).dtype == torch.bfloat16  # autocast is really on
    assert ours.dtype == torch.float32 and not ours.requires_grad
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.sum(1), torch.ones(10))


def test_bake_sends_no_gradient_to_the_features(generator):
    f = torch.randn(6, 3, generator=generator, requires_grad=True)
    z = torch.randn(6, 4, generator=generator, requires_grad=True)
    dlb_fast.bake_loss(z, f, torch.arange(6) % 4).backward()
    assert f.grad is None and z.grad is not None


def test_cs_kd_counts_anchors_only():
    criterion = dlb_fast.CsKDLoss(alpha=2.0, temperature=3.0)
    z = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = criterion(z, y)
    wanted = module_of("cs_kd").reference(z[:3], y[:3], z[3:], alpha=2.0, temperature=3.0)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    assert z.grad[3:].abs().sum() == 0 and criterion.counted == 3
    mask = torch.tensor([True, False, True, False, False, False])
    masked = criterion(z, y, kd_mask=mask)
    wanted = dlb_fast.cs_kd_loss(z[:3], y[:3], z[3:], alpha=2.0, temperature=3.0, kd_mask=mask[:3])
    torch.testing.assert_close(masked, wanted)
    assert criterion.eval()(z, y) > 0 and criterion.counted is None


def reassigned(criterion, alpha):
    criterion.alpha = alpha
    return criterion


WRONG = {
    "omega": (lambda z, y: dlb_fast.bake_loss(z, z, y, omega=1.0), "omega must be a number in \\[0, 1\\)"),
    "features": (lambda z, y: dlb_fast.bake_loss(z, z[:2], y), "features must have shape"),
    "copies": (lambda z, y: dlb_fast.mr_kd_loss(z, y, z), "copies_logits must have shape \\(K"),
    "ensemble": (lambda z, y: dlb_fast.MrKDLoss(ensemble_lr=0.0), "MrKDLoss: ensemble_lr must be a learning rate > 0"),
    "odd": (lambda z, y: dlb_fast.ddgsd_loss(z[:3], y[:3]), "an even number, got 3"),
    "odd pairs": (lambda z, y: dlb_fast.CsKDLoss()(z[:3], y[:3]), "an even number, got 3"),
    "share": (lambda z, y: dlb_fast.lsr_kd_loss(z, y, correct_share=1.5), "correct_share must be None"),
    "module's share": (lambda z, y: dlb_fast.LsrKDLoss(correct_share=1.5), "LsrKDLoss: correct_share must be None"),
    "dense share": (lambda z, y: dlb_fast.lsr_kd_loss(z, z.softmax(1), correct_share=0.5), "needs one class per row"),
    "past": (lambda z, y: dlb_fast.ps_kd_loss(z, y, z[:2]), "past must be floating with the shape of the logits"),
    "partner": (lambda z, y: dlb_fast.cs_kd_loss(z, y, z[:, :2]), "partner_logits must be floating with the shape"),
    "fewer partners": (lambda z, y: dlb_fast.cs_kd_loss(z, y, z[:2]), "partner_logits must be floating with the sh"),
    "copies' share": (lambda z, y: dlb_fast.mr_kd_loss(z, y, z[None], correct_share=2.0), "correct_share must be No"),
    "cross entropy": (lambda z, y: dlb_fast.lsr_kd_loss(z, y, alpha=2.0), "lsr_kd_loss: alpha must be at most 1, got"),
    "the same on the CPU": (lambda z, y: dlb_fast.lsr_kd_loss(z, y, alpha=torch.tensor(2.0)), "alpha must be at most"),
    "module": (lambda z, y: dlb_fast.MrKDLoss(alpha=1.5), "MrKDLoss: alpha must be at most 1, got 1.5"),
    "reassigned": (lambda z, y: reassigned(dlb_fast.LsrKDLoss(), 1.5)(z, y), "LsrKDLoss: alpha must be at most 1"),
    "virtual": (lambda z, y: dlb_fast.tf_kd_reg_loss(z, y, temperature=0.0), "temperature must be finite and > 0"),
    "virtual share": (
        lambda z, y: dlb_fast.tf_kd_reg_loss(z, y, correct_share=3.0),
        "correct_share must be between 0 and 1",
    ),
    "multiplier": (lambda z, y: dlb_fast.tf_kd_reg_loss(z, y, multiplier=0.0), "multiplier must be finite and > 0"),
    "classes": (lambda z, y: dlb_fast.TfKDRegLoss(4)(z, y), "TfKDRegLoss: logits must have C = 4 classes, got 5"),
    "one class": (lambda z, y: dlb_fast.zipf_loss(z[:, :1], 0 * y), "zipf_loss: needs at least 2 classes, got C = 1"),
    "mask": (lambda z, y: dlb_fast.lsr_kd_loss(z, y, kd_mask=torch.ones(3).bool()), "kd_mask must be a bool"),
    "alpha": (lambda z, y: dlb_fast.zipf_loss(z, y, alpha=-1.0), "alpha must be finite and >= 0"),
    "dense ranks": (lambda z, y: dlb_fast.ZipfLoss()(z, z.softmax(1)), "ZipfLoss: needs one class per row"),
    "dense virtual": (lambda z, y: dlb_fast.TfKDRegLoss(5)(z, z.softmax(1)), "TfKDRegLoss: needs one class per row"),
    "dense past": (lambda z, y: dlb_fast.PsKDLoss(4, 5)(z, z.softmax(1), y), "PsKDLoss: needs one class per row"),
    "no labels": (lambda z, y: dlb_fast.ZipfLoss()(z, None), "ZipfLoss: needs one class per row.*got no target"),
}


@pytest.mark.parametrize("name", WRONG)
def test_misuse_is_named(name, generator):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize(
    "call",
    [
        lambda z, y: dlb_fast.lsr_kd_loss([1.0], y),
        lambda z, y: dlb_fast.tf_kd_reg_loss([1.0], y),
        lambda z, y: dlb_fast.mr_kd_loss(z, y, [z]),
        lambda z, y: dlb_fast.bake_loss(z, [1.0], y),
        lambda z, y: dlb_fast.cs_kd_loss(z, y, None),
        lambda z, y: dlb_fast.ddgsd_loss([1.0], y),
        lambda z, y: dlb_fast.ps_kd_loss(z, y, [1.0]),
        lambda z, y: dlb_fast.zipf_loss(z, None),
    ],
)
def test_what_is_no_tensor_is_named(call, generator):
    with pytest.raises(TypeError, match=r"_loss: \w+ must be a torch.Tensor, got (list|NoneType)"):
        call(torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 3]))


# ---- cards and instructions

FOLDER = ROOT / "docs" / "methods"
CARDS = sorted(path for path in FOLDER.glob("*.md") if path.stem != "README")
HEADINGS = [
    "Formula", "How to use", "Hyper-parameters and where they come from", "State and extra cost", "Bad with", "Source",
]  # fmt: skip


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_cards_have_the_same_headings_and_their_code_runs(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    assert re.search(r"\*\*(Official|reconstruction|third-party)\*\*", text.split("## Source")[1])
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(path), "exec"), {})
    for preset in re.findall(r"--preset ([\w-]+)", text):
        assert preset in PRESETS
    fields = {name for part in to_dict(RunConfig()).values() for name in part}
    for flag in re.findall(r"`--([a-z-]+)(?: [\w.]+)?`", text):
        assert flag.replace("-", "_") in fields, flag


def test_every_method_has_its_card():
    index = set(re.findall(r"\((\w+)\.md\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert {method.card for method in METHODS.values()} <= index <= {path.stem for path in CARDS}


def test_the_method_of_contributing_runs():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    before = dict(METHODS)
    try:
        exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})
    finally:
        METHODS.clear()
        METHODS.update(before)


@pytest.mark.slow
def test_a_method_is_one_file_in_the_folder(tmp_path):
    """The file of CONTRIBUTING, put beside the others and nothing else: trained with its option as a flag."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package, source = tmp_path / "dlb_fast", ROOT / "dlb_fast"
    package.mkdir()
    for path in source.iterdir():
        if path.name != "methods":
            (package / path.name).symlink_to(path)
    shutil.copytree(source / "methods", package / "methods")
    (package / "methods" / "mixer.py").write_text(re.findall(r"```python\n(.*?)```", text, re.S)[0])
    flags = "--preset digits --method mixer --share 0.3 --max-steps 2 --batch-size 12 --per-class 4 --out run --quiet"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-m", "dlb_fast", "train", *flags.split()], cwd=tmp_path, env=environment, check=True
    )
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "method: mixer" in saved and "share: 0.3" in saved and "alpha: 0.5" in saved


def test_a_teacher_may_be_read_as_contributing_says():
    assert Teacher._fields[:4] == ("kind", "tensor", "correct_share", "mask")
