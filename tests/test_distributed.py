"""Two ranks against one: the same weights where the mathematics says so, exact evaluation, common decisions."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch
from builders import distance, last_checkpoint
from ranks import CLASSES, digits, make, network, trained
from torch import nn

from dlb_fast import ElrLoss, LastBatchLoss, PsKDLoss, bake_loss
from dlb_fast.data import EvalLoader
from dlb_fast.methods import bake
from dlb_fast.train import checkpoint
from dlb_fast.train.config import RunConfig, TrainConfig, override
from dlb_fast.train.distributed import Ranks, distributed_mode
from dlb_fast.train.evaluate import evaluate
from dlb_fast.train.loop import TrainingDiverged
from dlb_fast.train.run import build_trainer, resolve_device

torch.set_num_threads(1)


def on_rank(arguments, options):
    return trained(*arguments, **options)


SETTINGS = {
    "plain": {},
    "two_pass": {"forward": "two_pass"},
    "accumulated": {"accumulate": 2},
    "clipped": {"clip_grad": 0.05},
    "adam-ema": {"adam": True, "ema": 0.9},
    "channels-last": {"channels_last": True},
    "all": {"forward": "two_pass", "accumulate": 3, "clip_grad": 0.2, "ema": 0.5, "epochs": 3},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "ddp") for name in SETTINGS] + [(name, "fsdp") for name in ("plain", "adam-ema", "channels-last", "all")],
)
def test_two_ranks_train_like_one_process_on_the_joined_batch(name, kind, process_group):
    settings = SETTINGS[name]
    one = trained(alone=True, **settings)
    two = process_group(on_rank, (kind,), settings)
    start = {k: v for k, v in network().state_dict().items()}
    assert distance(one.weights, start) > 1e-3  # it did train
    assert two[0].sharded == (kind == "fsdp") and not one.sharded
    for rank in two:
        assert distance(one.weights, rank.weights) < 1e-12
        if one.average is not None:
            assert distance(one.average, rank.average) < 1e-12
            assert distance(rank.average, rank.weights) > 1e-4
        for name in ("loss", "ce", "lb", "train_top1", "test_nll", "images_seen", "step", "epoch", "lr"):
            assert rank.result[name] == pytest.approx(one.result[name], rel=1e-12)
        assert rank.mismatched == 0
    # each rank remembers its own rows; joined they are the one process's
    assert torch.equal(torch.cat([rank.ids for rank in two]), one.ids)
    torch.testing.assert_close(torch.cat([rank.logits for rank in two]), one.logits, rtol=0, atol=1e-11)


def test_clipping_is_by_the_norm_of_the_whole_gradient(process_group):
    """Clipping far below the norm makes the step's length `lr * clip_grad`, whoever holds which share."""
    settings = {"clip_grad": 0.01, "max_steps": 1, "eval_every": 1}
    for rank in process_group(on_rank, ("fsdp",), settings):
        start = network().state_dict()
        moved = torch.cat([(rank.weights[k] - start[k]).flatten() for k in start]).norm().item()
        assert moved == pytest.approx(0.05 * 0.01, rel=1e-5)


def test_with_batchnorm_each_rank_normalises_its_own_rows(process_group):
    """What docs/distributed.md says is not equal, is not; the ranks still agree with each other."""
    one = trained(alone=True, norm=nn.BatchNorm2d)
    two = process_group(on_rank, ("ddp",), {"norm": nn.BatchNorm2d})
    shared = process_group(on_rank, ("fsdp",), {"norm": nn.BatchNorm2d})
    assert distance(one.weights, two[0].weights) > 1e-4
    # the evaluation at the end gave all of them rank 0's statistics
    assert distance(two[0].weights, two[1].weights) == 0.0
    assert distance(two[0].weights, shared[0].weights) < 1e-12
    assert two[0].result["test_nll"] == two[1].result["test_nll"]


def drawn_ids(norm):
    """Ids and weights of a rank, with random numbers of its own."""
    trainer = make("ddp", dropout=0.5, max_steps=2, eval_every=2)
    masks = []
    trainer.model[6].register_forward_hook(lambda m, i, o: masks.append((o == 0).float()))
    trainer.fit()
    return masks[0]


def test_ranks_drop_different_units(process_group):
    first, second = process_group(drawn_ids, None)
    assert first.shape == second.shape and not torch.equal(first, second)


class WithCriterion(nn.Module):
    """A user's own wrapping: the criterion inside of what DDP wraps."""

    def __init__(self):
        super().__init__()
        self.model, self.criterion = network(), LastBatchLoss(CLASSES, capacity=4)

    def forward(self, images, targets):
        return self.criterion(self.model(images), targets)


def wrapped_buffer():
    rank = torch.distributed.get_rank()
    wrapper = WithCriterion()
    parallel = nn.parallel.DistributedDataParallel(wrapper)  # broadcasts buffers by default
    torch.manual_seed(rank)
    seen = []
    for rows in (4, 8):
        images = torch.rand(rows, 1, 8, 8, dtype=torch.float64)
        parallel(images, torch.zeros(rows, dtype=torch.long)).backward()
        seen.append(images[-4:])
    with torch.no_grad():
        return wrapper.criterion.buffer.logits.clone(), wrapper.model(seen[-1])


def test_ddp_leaves_the_remembered_rows_alone(process_group):
    (first, own_first), (second, own_second) = process_group(wrapped_buffer)
    assert torch.equal(first.double(), own_first.float().double()) or torch.allclose(first, own_first.to(first.dtype))
    assert torch.allclose(second, own_second.to(second.dtype)) and not torch.allclose(first, second)


def cross_rank_methods():
    """BAKE and PS-KD on half of 12 rows each, with the other rank's rows and without; rank by rank."""
    rank = torch.distributed.get_rank()
    mine = slice(6 * rank, 6 * rank + 6)
    z, f, y = method_rows()
    own = z[mine].clone().requires_grad_()
    loss = bake_loss(own, f[mine], y[mine], omega=0.9, temperature=2.0, cross_rank=True)
    loss.backward()
    alone = bake_loss(z[mine], f[mine], y[mine], omega=0.9, temperature=2.0)
    y[0] = y[7] = -100
    banks = []
    for cross_rank in (True, False):
        criterion = PsKDLoss(12, 4, cross_rank=cross_rank)
        criterion(3 * own, y[mine], torch.arange(12)[mine])
        again = criterion(own, y[mine], torch.arange(12)[mine])  # no sample had been seen: its label still teaches
        torch.testing.assert_close(again, torch.nn.functional.cross_entropy(own, y[mine]))
        banks.append(criterion.bank.state_dict())
    averages = []
    for cross_rank in (True, False):
        criterion = ElrLoss(12, 4, cross_rank=cross_rank)
        for ids in (torch.arange(12)[mine], torch.arange(12).roll(6)[mine]):  # the second time on the other rank
            criterion(z[ids], y[ids], ids)
            criterion(z[ids].requires_grad_(), y[ids], ids)  # the same batch, once
            criterion.step()
        averages.append(criterion.bank.state_dict())
    return loss.detach(), alone, own.grad, banks, averages


def elr_averages(z):
    """The average after two visits with the same prediction: 0.3 (1 + 0.7) of it."""
    p = torch.softmax(z, 1).clamp(1e-4, 1 - 1e-4)
    return 0.3 * 1.7 * p / p.sum(1, keepdim=True)


def method_rows():
    g = torch.Generator().manual_seed(5)
    return torch.randn(12, 4, generator=g), torch.randn(12, 6, generator=g), torch.randint(0, 4, (12,), generator=g)


def test_methods_on_two_ranks_are_one_rank_with_the_joined_batch(process_group):
    first, second = process_group(cross_rank_methods)
    z, f, y = method_rows()
    joined = z.clone().requires_grad_()
    whole = bake.reference(joined, f, y, omega=0.9, temperature=2.0)
    whole.backward()
    assert (first[0] + second[0]).item() / 2 == pytest.approx(whole.item(), abs=1e-5)  # the mean over ranks
    assert abs((first[1] + second[1]) / 2 - whole) > 1e-3  # is not what each rank does alone
    torch.testing.assert_close(torch.cat([first[2], second[2]]) / 2, joined.grad, rtol=1e-4, atol=1e-6)
    labelled = torch.ones(12, dtype=torch.bool).index_fill_(0, torch.tensor([0, 7]), False)
    elr, p = elr_averages(z), torch.softmax(z, 1).clamp(1e-4, 1 - 1e-4)
    for _, _, _, _, (shared, own) in (first, second):
        assert torch.equal(shared["seen"], labelled) and torch.equal(own["seen"], labelled)
        torch.testing.assert_close(shared["rows"][labelled], elr[labelled])
        torch.testing.assert_close(own["rows"][labelled], 0.3 * (p / p.sum(1, keepdim=True))[labelled])
    for rank, (_, _, _, (shared, own), _) in enumerate((first, second)):
        assert torch.equal(shared["seen"], labelled)  # both ranks' labelled rows are on every rank
        assert torch.equal(own["seen"], labelled & (torch.arange(12) // 6 == rank))
        for bank in (shared, own):
            seen = bank["seen"]
            torch.testing.assert_close(bank["rows"].float()[seen], torch.log_softmax(z, 1)[seen], rtol=2e-3, atol=2e-3)


# ---- evaluation


def scores_of(kind, rows):
    trainer = make(kind)
    ranks = Ranks.current()
    share = EvalLoader(digits(23, 4), rows, dtype=torch.float64, rank=ranks.rank, world_size=2)
    return len(share), evaluate(trainer.model, share, ranks=ranks)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_test_image_counts_once(kind, process_group):
    alone = evaluate(network(), EvalLoader(digits(23, 4), 7, dtype=torch.float64))
    assert alone["count"] == 23
    for rows in (3, 11, 64):  # 23 images: 11 and 12; with 11 rows one rank has a batch more than the other
        (steps, first), (others, second) = process_group(scores_of, kind, rows)
        assert first == second and (steps != others or rows != 11)
        assert (first["count"], first["top1"], first["top5"]) == (23, alone["top1"], alone["top5"])
        assert first["nll"] == pytest.approx(alone["nll"], rel=1e-12)
        assert first["calibration"]["share"] == alone["calibration"]["share"]
        assert first["confusion"] == alone["confusion"] and sum(n for *_, n in first["confusion"]) == 23


def too_few():
    ranks = Ranks.current()
    try:
        evaluate(network(), EvalLoader(digits(1), 4, dtype=torch.float64), ranks=ranks)
    except ValueError as error:
        return str(error)


def test_fewer_images_than_ranks_is_said_on_all(process_group):
    assert all("an image for each of 2 ranks" in said for said in process_group(too_few))


# ---- agreement


def diverging(folder):
    trainer = make("ddp", folder)
    original = trainer.forward_backward

    def poisoned(batch):
        if trainer.step == 4 and trainer.ranks.rank == 1:
            batch.images = batch.images * float("nan")
        original(batch)

    trainer.forward_backward = poisoned
    try:
        trainer.fit()
    except TrainingDiverged as error:
        return str(error)


def test_a_loss_that_is_nan_on_one_rank_stops_all(process_group, tmp_path):
    said = process_group(diverging, tmp_path)
    assert all("NaN or infinite by step 5" in text for text in said), said


def stopped(folder, who, kind, settings):
    trainer = make(kind, folder, epochs=400, eval_every=10_000, **settings)
    original = trainer.optimizer_step

    def noticing():
        if trainer.step == 6 and trainer.ranks.rank == who:
            trainer.stop.signal = signal.SIGTERM
        original()

    trainer.optimizer_step = noticing
    result = trainer.fit()
    return trainer.step, result["stopped_by"], result["images_seen"]


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_on_any_rank_stops_all_at_one_step(who, process_group, tmp_path):
    (step, by, seen), other = process_group(stopped, tmp_path, who, "ddp", {})
    assert other == (step, by, seen) and by == "SIGTERM" and 6 < step < 300
    saved = last_checkpoint(tmp_path)
    assert saved["step"] == step and len(saved["others"]) == 1


def seen_by(folder, restarts, local_size):
    """What `check_shared` says where rank 0 alone sees its file."""
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = restarts
    ranks = dataclasses.replace(Ranks.current(), local_size=local_size)
    try:
        ranks.check_shared(folder / f"config-{ranks.rank}.yaml")
    except ValueError as error:
        return str(error)
    finally:
        del os.environ["TORCHELASTIC_MAX_RESTARTS"]


def test_a_run_that_may_restart_needs_a_folder_that_all_machines_see(process_group, tmp_path):
    (tmp_path / "config-0.yaml").touch()
    for said in process_group(seen_by, tmp_path, "3", 1):
        assert "rank 1: " in said and "config-1.yaml does not exist on" in said and "--out" in said
    assert process_group(seen_by, tmp_path, "0", 1) == process_group(seen_by, tmp_path, "3", 2) == [None, None]


def failing_save(folder):
    trainer = make("ddp", folder)

    def full(*args, **kwargs):
        raise checkpoint.CheckpointError("cannot write: the disk is full")

    before, checkpoint.save_checkpoint = checkpoint.save_checkpoint, full
    try:
        trainer.fit()
    except checkpoint.CheckpointError as error:
        return str(error)
    finally:
        checkpoint.save_checkpoint = before


def test_a_full_disk_is_everybodys_error(process_group, tmp_path):
    assert process_group(failing_save, tmp_path) == ["cannot write: the disk is full"] * 2


def decisions():
    ranks = Ranks.current()
    asked = []
    value = ranks.run_on_main(lambda: asked.append(1) or "made")
    try:
        ranks.run_on_main(lambda: 1 / 0)
        failed = ""
    except ZeroDivisionError as error:
        failed = str(error)
    rows = torch.full((ranks.rank + 1, 2), ranks.rank)
    return (
        value,
        len(asked),
        failed,
        ranks.broadcast(ranks.rank),
        ranks.gather(ranks.rank),
        ranks.sum([1.0, ranks.rank]),
        ranks.max([ranks.rank, -ranks.rank]),
        ranks.cat(rows).tolist(),
        ranks.first_failure("broken" if ranks.rank else None),
    )


def test_what_ranks_can_agree_on(process_group):
    common = ("division by zero", 0)
    for rank, found in enumerate(process_group(decisions)):
        assert found[:2] == ("made", 1 - rank) and found[2:4] == common
        assert found[4] == ([] if rank else [0, 1]) and found[5] == [2.0, 1.0] and found[6] == [1.0, 0.0]
        assert found[7] == [[0, 0], [1, 1], [1, 1]] and found[8] == "rank 1: broken"


# ---- refused


def test_modes_that_cannot_work_are_refused():
    cpu, criterion = torch.device("cpu"), nn.CrossEntropyLoss()
    two = Ranks(1, 2, grouped=True)
    assert distributed_mode(TrainConfig(), Ranks(), criterion, cpu) == "none"
    assert distributed_mode(TrainConfig(), two, criterion, cpu) == "ddp"
    for settings, ranks, said in (
        ({"distributed": "none"}, two, "distributed=none expects one process, got 2 ranks"),
        ({"distributed": "ddp"}, Ranks(), "distributed=ddp expects ranks.*torchrun --nproc-per-node"),
        ({"distributed": "fsdp"}, Ranks(), "distributed=fsdp expects ranks"),
        ({"sync_bn": True}, two, "sync_bn expects GPUs.*got device cpu"),
    ):
        with pytest.raises(ValueError, match=said):
            distributed_mode(TrainConfig(**settings), ranks, criterion, cpu)
    criterion.copies_model = True
    with pytest.raises(ValueError, match="distributed=fsdp expects a method that does not copy the model"):
        distributed_mode(TrainConfig(distributed="fsdp"), two, criterion, cpu)


def test_a_batch_that_does_not_divide_is_refused():
    three = dataclasses.replace(Ranks(0, 3), grouped=True)
    with pytest.raises(ValueError, match="rows of all ranks; 3 ranks expect a multiple of 6, got 128; use 126 or 132"):
        build_trainer(override(RunConfig(), batch_size=128), ranks=three)


def test_a_gpu_per_rank_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    four = Ranks(0, 4, 0, 4, True)
    with pytest.raises(ValueError, match="4 ranks on this machine expect as many GPUs, it has 2"):
        resolve_device("auto", four)
    with pytest.raises(ValueError, match="device expects cuda, auto or cpu on 4 ranks, got 'cuda:1'"):
        resolve_device("cuda:1", four)


def test_only_training_runs_through_compile(monkeypatch):
    """`torch.compile` itself is torch's; here: what is given to it, and who calls the result."""
    calls = []

    def compiled(network, **options):
        assert options == {"dynamic": False}
        return lambda images: calls.append(network.training) or network(images)

    monkeypatch.setattr(torch, "compile", compiled)
    through = trained(alone=True, compile=True)
    assert calls == [True] * through.result["step"]
    plain = trained(alone=True)
    assert distance(through.weights, plain.weights) == 0.0
