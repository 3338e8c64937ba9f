"""LastBatchTrainer with the real Trainer: checkpoints, accumulation, evaluation."""

from __future__ import annotations

import os
import textwrap

import pytest
import torch
import torch.nn.functional as F
from builders import ROOT, environment, python
from frameworks import reason_against
from torch import nn

from dlb_fast import LastBatchLoss
from dlb_fast.data import OverlapLoader, ResidentLoader, synthetic

if REASON := reason_against("transformers.trainer"):
    pytest.skip(REASON, allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import Trainer, TrainingArguments, set_seed  # noqa: E402
from transformers.utils import logging  # noqa: E402

from dlb_fast.integrations.hf import LastBatchTrainer, as_dataloader  # noqa: E402

logging.set_verbosity_error()
DATA = {split: synthetic(split, length=52, num_classes=4, size=8) for split in ("train", "test")}


class Items(torch.utils.data.Dataset):
    def __init__(self, split):
        self.images = DATA[split]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return {"pixel_values": image.float() / 255, "labels": label, "unused": "text"}


class Net(nn.Module):
    def __init__(self, dropout=0.2):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4))

    def forward(self, pixel_values):
        return {"logits": self.net(pixel_values)}


class Recorder(LastBatchTrainer):
    def compute_loss(self, model, inputs, *args, **options):
        if model.training:
            self.seen = [*getattr(self, "seen", []), inputs["ids"].tolist()]
        return super().compute_loss(model, inputs, *args, **options)


class SecondVisitInverted(Items):
    """Two views of every sample, or the last-batch term of one update would be 0."""

    def __init__(self, split):
        super().__init__(split)
        self.visited = set()

    def __getitem__(self, index):
        item, again = super().__getitem__(index), index in self.visited
        self.visited.add(index)
        return {**item, "pixel_values": 1 - item["pixel_values"] if again else item["pixel_values"]}


def make(folder, loader=None, net=None, kind=Recorder, items=Items, **options):
    set_seed(0)
    arguments = {
        "use_cpu": True, "per_device_train_batch_size": 16, "num_train_epochs": 3, "save_steps": 4, "report_to": [],
        "logging_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2, "dataloader_pin_memory": False,
        "per_device_eval_batch_size": 64, **options,
    }  # fmt: skip
    return kind(
        (net or Net)(), TrainingArguments(folder, **arguments), train_dataset=items("train"),
        eval_dataset=Items("test"), criterion=LastBatchLoss(4), train_loader=loader,
    )  # fmt: skip


def weights(trainer):
    return torch.cat([value.flatten() for value in trainer.model.state_dict().values()])


CASES = {
    "as it comes": (None, {}),  # 7 steps an epoch, the last with a short half
    "workers": (None, {"dataloader_num_workers": 2}),
    "accumulation": (None, {"gradient_accumulation_steps": 2, "save_steps": 3}),
    "steps": (None, {"max_steps": 13, "dataloader_drop_last": True}),
    "resident": (lambda: ResidentLoader(DATA["train"], 16), {}),
    "overlap": (
        lambda: OverlapLoader(DATA["train"], 16, num_threads=1),
        {"gradient_accumulation_steps": 4, "save_steps": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_continues_bit_for_bit(tmp_path, case):
    """Without evaluation in between: the Trainer draws a random number for it after it saved those of the dropout."""
    loader, options = CASES[case]
    whole = make(tmp_path / "whole", loader and loader(), **options)
    whole.train()
    assert whole.criterion.buffer.mismatched == 0 and whole.criterion.parts.lb > 0
    made = sorted((tmp_path / "whole").glob("checkpoint-*"))
    assert len(made) >= 3
    for checkpoint in made:
        if checkpoint.name == f"checkpoint-{whole.state.global_step}":
            continue
        resumed = make(tmp_path / checkpoint.name, loader and loader(), **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], checkpoint.name
        assert torch.equal(weights(resumed), weights(whole)), checkpoint.name


def test_the_newest_checkpoint_is_found_and_the_saved_model_is_the_model_alone(tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    stopped = make(tmp_path / "stopped")
    stopped.add_callback(_stop_at(9))
    stopped.train()
    resumed = make(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))
    import safetensors.torch

    saved = safetensors.torch.load_file(tmp_path / "stopped" / "checkpoint-8" / "model.safetensors")
    assert set(saved) == set(whole.model.state_dict())


def _stop_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            control.should_training_stop = state.global_step == step

    return Stop()


def test_a_checkpoint_of_somebody_else_continues_at_the_right_place(tmp_path):
    whole = make(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    (checkpoint / "dlb_fast_0.pt").unlink()
    resumed = make(tmp_path / "resumed")
    with pytest.warns(UserWarning, match="continue at epoch 1, step 5, and the criterion starts empty"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.seen == whole.seen[12:]


def test_other_data_are_refused(tmp_path):
    make(tmp_path / "whole", num_train_epochs=1).train()
    resumed = make(tmp_path / "whole", data_seed=7)
    with pytest.raises(ValueError, match="seed was 42 when the state was saved and is 7 here"):
        resumed.train(resume_from_checkpoint=True)


def test_evaluation_is_plain_cross_entropy_and_leaves_the_memory_alone(tmp_path):
    trainer = make(tmp_path, num_train_epochs=1)
    trainer.train()
    before = trainer.criterion.state_dict()["_extra_state"]
    metrics = trainer.evaluate()
    images, labels = DATA["test"].images / 255, DATA["test"].targets
    with torch.no_grad():
        want = F.cross_entropy(trainer.model.cpu().eval()(images)["logits"], labels)
    assert metrics["eval_loss"] == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(trainer.criterion.state_dict()["_extra_state"], before)
    assert trainer.predict(Items("test")).predictions.shape == (len(DATA["test"]), 4)


def test_accumulated_cross_entropy_is_that_of_the_whole_batch(tmp_path):
    """The first micro-batch of a run has half the rows: a mean of means would count them double."""

    def gradient(steps, rows, alpha):
        trainer = make(
            tmp_path, net=lambda: Net(dropout=0.0), gradient_accumulation_steps=steps, per_device_train_batch_size=rows,
            max_steps=1, max_grad_norm=0.0, save_strategy="no", optim="sgd", learning_rate=1.0, weight_decay=0.0,
            lr_scheduler_type="constant", dataloader_drop_last=True, items=SecondVisitInverted,
        )  # fmt: skip
        trainer.criterion.alpha = alpha
        before = weights(trainer)
        trainer.train()
        return trainer, before - weights(trainer)

    trainer, got = gradient(3, 16, 0.0)
    assert [len(batch) for batch in trainer.seen] == [8, 16, 16]
    set_seed(0)
    net = Net(dropout=0.0)
    images = [DATA["train"].images[batch] / 255 for batch in trainer.seen]
    for old in (images[1][:8], images[2][:8]):
        old.copy_(1 - old)
    z = [net(view)["logits"] for view in images]
    labels = torch.cat([DATA["train"].targets[batch] for batch in trainer.seen])
    F.cross_entropy(torch.cat(z), labels).backward(retain_graph=True)
    assert torch.allclose(got, torch.cat([p.grad.flatten() for p in net.parameters()]), atol=1e-5)
    # and the last-batch term is the mean over the micro-batches, whatever their sizes
    _, both = gradient(3, 16, 100.0)
    terms = []
    for before, now in ((z[0], z[1][:8]), (z[1][8:], z[2][:8])):
        teacher, student = F.softmax(before.detach() / 3, 1), F.log_softmax(now / 3, 1)
        terms.append(9 * F.kl_div(student, teacher, reduction="batchmean"))
    net.zero_grad()
    (100 * sum(terms) / 3).backward()
    want = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert want.abs().max() > 0.05
    assert torch.allclose(both - got, want, atol=1e-3)


def test_a_model_that_owns_the_criterion_is_saved_by_the_plain_trainer(tmp_path):
    """safetensors takes tensors only, and the memory is one."""

    class Owner(Net):
        def __init__(self):
            super().__init__()
            self.criterion = LastBatchLoss(4)

        def forward(self, pixel_values, labels, ids=None, num_old=None):
            logits = self.net(pixel_values)
            return {"loss": self.criterion(logits, labels, ids, num_old=num_old), "logits": logits}

    class Plain(Trainer):
        def __init__(self, *args, criterion, train_loader, **options):
            super().__init__(*args, **options)
            self.loader = train_loader

        def get_train_dataloader(self):
            return as_dataloader(self.loader)

    trainer = make(tmp_path, ResidentLoader(DATA["train"], 16), net=Owner, kind=Plain, num_train_epochs=1)
    trainer.train()
    again = Owner()
    import safetensors.torch

    again.load_state_dict(safetensors.torch.load_file(next(tmp_path.glob("checkpoint-6/model.safetensors"))))
    assert torch.equal(again.criterion.buffer.logits, trainer.model.criterion.buffer.logits)
    assert trainer.model.criterion.buffer.mismatched == 0


def test_refusals(tmp_path):
    with pytest.raises(TypeError, match="criterion must be a LastBatchLoss, got CrossEntropyLoss"):
        LastBatchTrainer(Net(), TrainingArguments(tmp_path, use_cpu=True), criterion=nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"expected a loader of dlb_fast.data.* got DataLoader with batch_sampler"):
        make(tmp_path, torch.utils.data.DataLoader(Items("train")))
    with pytest.raises(ValueError, match="batch_size must be even"):
        make(tmp_path, per_device_train_batch_size=15).train()
    loader = ResidentLoader(DATA["train"], 16)
    loader.load_state_dict({**loader.state_dict(), "step": 3})
    with pytest.raises(RuntimeError, match="the Trainer is at step 0 of the epoch and ResidentLoader at 3"):
        next(iter(as_dataloader(loader)))


# The end frees the model that DistributedDataParallel wraps and then destroys the process group: gloo's threads abort a
# process that exits while they run.
SCRIPT = """
    import gc, sys, torch
    import test_integrations_hf as case
    folder, resume = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    trainer = case.make(f"{folder}/resumed" if resume else f"{folder}/whole", per_device_train_batch_size=8,
                        gradient_accumulation_steps=2, save_steps=3, ddp_backend="gloo")
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.criterion.buffer.mismatched == 0
    if trainer.args.process_index == 0:
        torch.save(case.weights(trainer), f"{folder}/{'resumed' if resume else 'whole'}.pt")
    torch.distributed.barrier()
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(tmp_path):
    script = tmp_path / "ranked.py"
    script.write_text(textwrap.dedent(SCRIPT))
    path = f"{environment()['PYTHONPATH']}:{ROOT / 'tests'}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    for checkpoint in ([], [tmp_path / "whole" / "checkpoint-3"]):
        python(*launch, *checkpoint, cwd=tmp_path, PYTHONPATH=path)
    assert len(list((tmp_path / "whole" / "checkpoint-3").glob("dlb_fast_*.pt"))) == 2
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "resumed"))
    assert torch.equal(whole, resumed)
