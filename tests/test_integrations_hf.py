"""LastBatchTrainer with the real Trainer: checkpoints, accumulation, evaluation."""

from __future__ import annotations

import os
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from builders import ROOT, environment, python
from frameworks import reason_against
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlb_fast import LastBatchLoss
from dlb_fast.data import Mix, OverlapLoader, ResidentLoader, synthetic

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
    made = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(made) >= 3
    for checkpoint in {made[0], made[-2]}:
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


class Doubles(Items):
    """float64, two views of every sample, and the labels of `ignored` samples replaced."""

    def __init__(self, split, ignored=(), label=-100):
        super().__init__(split)
        self.ignored, self.label, self.visited = set(ignored), label, set()

    def __getitem__(self, index):
        item, again = super().__getitem__(index), index in self.visited
        self.visited.add(index)
        view = item["pixel_values"].double()
        label = self.label if index in self.ignored else item["labels"]
        return {"pixel_values": 1 - view if again else view, "labels": label}


class Casting(Net):
    def forward(self, pixel_values):
        return super().forward(pixel_values.double())


class Kept(LastBatchTrainer):
    """Keeps what every micro-batch was made of."""

    def compute_loss(self, model, inputs, *args, **options):
        if model.training:
            names = ("pixel_values", "labels", "target_b", "lam")
            own = {name: inputs[name].clone() for name in names if name in inputs}
            self.kept = [*getattr(self, "kept", []), {**own, "num_old": inputs["num_old"]}]
        return super().compute_loss(model, inputs, *args, **options)


def by_hand(ranks, net, accumulate, *, ignore_index=-100, weight=None, smoothing=0.0, alpha=2.0, lr=0.5):
    """The weights and the terms of every update, in plain torch and float64, from the micro-batches of every rank."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    options = {"ignore_index": ignore_index, "weight": weight, "label_smoothing": smoothing}
    stored, terms = [None] * len(ranks), []
    steps = list(zip(*ranks, strict=True))
    epochs = [steps[first : first + 7] for first in range(0, len(steps), 7)]
    for group in (epoch[first : first + accumulate] for epoch in epochs for first in range(0, len(epoch), accumulate)):
        logits, labels, kl = [], [], []
        for rank, batch in ((rank, batch) for step in group for rank, batch in enumerate(step)):
            z, old = net(batch["pixel_values"])["logits"], batch["num_old"]
            logits.append(z)
            labels.append(batch["labels"])
            if "lam" in batch:
                share = batch["lam"].double()[:, None]
                both = (F.one_hot(batch[name], 4) for name in ("labels", "target_b"))
                labels[-1] = share * next(both) + (1 - share) * next(both)
            if stored[rank] is None:
                kl.append(z.sum() * 0)
            else:
                assert len(stored[rank]) == old
                teacher, student = F.softmax(stored[rank] / 3, 1), F.log_softmax(z[:old] / 3, 1)
                kl.append(9 * F.kl_div(student, teacher, reduction="batchmean"))
            stored[rank] = z[old:].detach()
        ce, lb = F.cross_entropy(torch.cat(logits), torch.cat(labels), **options), sum(kl) / len(kl)
        optimizer.zero_grad()
        (ce + alpha * lb).backward()
        optimizer.step()
        terms.append((ce.item(), lb.item()))
    return torch.cat([value.flatten() for value in net.state_dict().values()]), terms


def trained(folder, *, data=(), criterion=None, kind=Kept, net=None, loader=None, **options):
    """A trainer that has trained in float64 by plain SGD, and the weights and the terms that a plain loop gives."""
    set_seed(0)
    net = net or Net(dropout=0.0)
    net = net.double()
    arguments = {
        "use_cpu": True, "per_device_train_batch_size": 16, "max_steps": 5, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "max_grad_norm": 0.0, "dataloader_pin_memory": False, "logging_steps": 1,
        "train_sampling_strategy": "sequential", "per_device_eval_batch_size": 64, **options,
    }  # fmt: skip
    criterion = {"alpha": 2.0, **(criterion or {})}
    trainer = kind(
        net, TrainingArguments(folder, **arguments), train_dataset=Doubles("train", *data),
        eval_dataset=Doubles("test"), criterion=LastBatchLoss(4, **criterion), train_loader=loader,
    )  # fmt: skip
    start = {name: value.clone() for name, value in net.state_dict().items()}
    trainer.train()
    plain = Casting(dropout=0.0).double()
    plain.load_state_dict(start)
    used = trainer.criterion
    want = by_hand(
        [trainer.kept], plain, trainer.args.gradient_accumulation_steps, ignore_index=used.ignore_index,
        weight=used.weight, smoothing=options.get("label_smoothing_factor") or criterion.get("label_smoothing", 0.0),
    )  # fmt: skip
    return trainer, *want


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
VALUES = {
    "one batch an update": {},
    # the first micro-batch has half the rows: a mean of means would count them double
    "accumulation": {"gradient_accumulation_steps": 3},
    "the last update of an epoch is shorter": {"gradient_accumulation_steps": 4},
    "a micro-batch without labels": {"data": (range(8, 24),), "gradient_accumulation_steps": 3},
    "an update without labels": {"data": (range(24),), "gradient_accumulation_steps": 3, "max_steps": 1},
    "few labels": {"data": ([*range(1, 16), 20, 30, 40],), "gradient_accumulation_steps": 2},
    "another ignore_index": {
        "data": ([*range(8, 24), 30], 255), "criterion": {"ignore_index": 255}, "gradient_accumulation_steps": 3,
    },
    "-100 is no label of this run": {
        "data": ([3, 30], 1), "criterion": {"ignore_index": 1}, "gradient_accumulation_steps": 2,
    },
    "class weights": {"criterion": {"weight": CLASS_WEIGHTS}, "gradient_accumulation_steps": 3},
    "class weights and a micro-batch without labels": {
        "data": (range(8, 24),), "criterion": {"weight": CLASS_WEIGHTS}, "gradient_accumulation_steps": 3,
    },
    "label_smoothing_factor": {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
    "the criterion's own smoothing": {"criterion": {"label_smoothing": 0.2}, "gradient_accumulation_steps": 2},
    "smoothing and class weights": {
        "criterion": {"weight": CLASS_WEIGHTS}, "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2,
    },
    "tokens counted per rank": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 3},
    "evaluation after every update": {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 2},
    "evaluation before training": {"eval_on_start": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "a random order": {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2},
    "accumulation by accelerate": {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 3}}},
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_weights_and_logs_are_those_of_a_plain_loop(tmp_path, case):
    if case == "an update without labels":  # torch's mean of nothing is NaN; here it is 0
        trainer, _, _ = trained(tmp_path, **VALUES[case])
        logged = trainer.state.log_history[0]
        assert logged["cross_entropy"] == 0 and logged["loss"] == pytest.approx(2 * logged["last_batch"], rel=1e-6)
        assert logged["last_batch"] > 1e-3 and weights(trainer).isfinite().all()
        return
    trainer, want, terms = trained(tmp_path, **VALUES[case])
    assert len(terms) == trainer.state.global_step and max(lb for _, lb in terms) > 0.01
    first = (DATA["train"].images[:8] / 255).double()
    assert torch.equal(trainer.kept[0]["pixel_values"], first) is (case != "a random order")
    assert (weights(trainer) - want).abs().max() < 1e-6  # the counts of rows are float32
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(terms)
    for entry, (ce, lb) in zip(logs, terms, strict=True):
        assert entry["cross_entropy"] == pytest.approx(ce, rel=1e-6)
        assert entry["last_batch"] == pytest.approx(lb, rel=1e-6, abs=1e-12)
        assert entry["loss"] == pytest.approx(ce + 2 * lb, rel=1e-6)


class Sequences(torch.utils.data.Dataset):
    """Sequences of tokens of five kinds; the labels of the last tokens are missing, two of them in a row at most."""

    def __init__(self, split, length=6):
        self.length = length

    def __len__(self):
        return len(DATA["train"])

    def __getitem__(self, index):
        length = self.length if type(self.length) is int else self.length(index)
        tokens = torch.randint(5, (length,), generator=torch.Generator().manual_seed(int(index)))
        counts = torch.arange(length) < length - index % 3
        return {"input_ids": tokens, "labels": tokens.where(counts, -100)}


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(5, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, input_ids):
        return {"logits": self.net(input_ids)}


class Reader(LastBatchTrainer):
    def compute_loss(self, model, inputs, *args, **options):
        if model.training:
            self.batches = [*getattr(self, "batches", []), (inputs["input_ids"], inputs["labels"], inputs["num_old"])]
        return super().compute_loss(model, inputs, *args, **options)


def language(folder, items=Sequences, net=None, criterion=None, shift=True, from_hidden=False, **options):
    set_seed(0)
    arguments = {
        "use_cpu": True, "per_device_train_batch_size": 16, "max_steps": 5, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "max_grad_norm": 0.0, "dataloader_pin_memory": False, "logging_steps": 1,
        "remove_unused_columns": False, **options,
    }  # fmt: skip
    return Reader(
        net or Language().double(), TrainingArguments(folder, **arguments), train_dataset=items("train"),
        eval_dataset=items("test"), criterion=criterion or LastBatchLoss(5, alpha=2.0), shift_labels=shift,
        from_hidden=from_hidden,
    )  # fmt: skip


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_tokens_are_rows(tmp_path, accumulate, shift):
    """Labels (B, T): the weights and logs of a plain loop, with and without a shift between logits and labels."""
    trainer = language(tmp_path, shift=shift, gradient_accumulation_steps=accumulate)
    net = Language().double()
    net.load_state_dict(trainer.model.state_dict())
    trainer.train()
    optimizer, stored, logs = torch.optim.SGD(net.parameters(), lr=0.5), None, []
    kept = trainer.batches
    epochs = [kept[first : first + 7] for first in range(0, len(kept), 7)]
    for group in (epoch[k : k + accumulate] for epoch in epochs for k in range(0, len(epoch), accumulate)):
        ce, count, kl = 0.0, 0, []
        for tokens, labels, old in group:
            z, y = net(tokens)["logits"], labels
            if shift:
                z, y = z[:, :-1], labels[:, 1:]
            ce = ce + F.cross_entropy(z.reshape(-1, 5), y.reshape(-1), reduction="sum")
            count += (y != -100).sum()
            if stored is not None:
                valid = y[:old] != -100
                teacher, student = F.softmax(stored / 3, -1)[valid], F.log_softmax(z[:old] / 3, -1)[valid]
                kl.append(9 * F.kl_div(student, teacher, reduction="batchmean"))
            else:
                kl.append(z.sum() * 0)
            stored = z[old:].detach()
        optimizer.zero_grad()
        (ce / count + 2 * sum(kl) / len(kl)).backward()
        optimizer.step()
        logs.append(((ce / count).item(), (sum(kl) / len(kl)).item()))
    want = torch.cat([value.flatten() for value in net.state_dict().values()])
    assert (weights(trainer) - want).abs().max() < 1e-6 and max(kl for _, kl in logs) > 1e-3
    assert trainer.criterion.buffer.mismatched == 0
    found = [(entry["cross_entropy"], entry["last_batch"]) for entry in trainer.state.log_history if "loss" in entry]
    assert [value for pair in found for value in pair] == pytest.approx([v for pair in logs for v in pair], rel=1e-5)
    with torch.no_grad():
        batch = [trainer.eval_dataset[index] for index in range(8)]
        tokens, y = (torch.stack([item[name] for item in batch]) for name in ("input_ids", "labels"))
        z = net(tokens)["logits"]
        z, y = (z[:, :-1], y[:, 1:]) if shift else (z, y)
    found = trainer.evaluate(torch.utils.data.Subset(trainer.eval_dataset, range(8)))["eval_loss"]
    assert found == pytest.approx(F.cross_entropy(z.reshape(-1, 5), y.reshape(-1)).item(), rel=1e-5)


def test_a_causal_language_model_shifts_and_resumes(tmp_path):
    """The Trainer knows by the model that the labels are shifted; the loss in evaluation is the model's own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=5, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)

    def run(folder, resume=None, **options):
        net = GPT2LMHeadModel(config)
        trainer = language(folder, net=net, shift=None, save_strategy="steps", save_steps=4, max_steps=9, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    assert whole.shift_labels is True and whole.criterion.buffer.taught > 0
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(weights(resumed), weights(whole))
    tokens = whole.eval_dataset[0]["input_ids"][None]
    with torch.no_grad():
        want = whole.model.eval()(input_ids=tokens, labels=tokens).loss
    found = whole.evaluate(torch.utils.data.Subset(whole.eval_dataset, [0]))["eval_loss"]
    assert found == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"keep": "top_k"}])
def test_from_hidden_states_trains_as_from_logits(tmp_path, options):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=5, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    seen = []

    class Seen(GPT2LMHeadModel):
        def forward(self, *args, **options):
            outputs = super().forward(*args, **options)
            seen.append(tuple(outputs["logits"].shape[:2]))
            return outputs

    def run(from_hidden, keep="logits", **options):
        set_seed(0)
        kept = {"keep": keep, "k": 3} if keep == "top_k" else {}
        criterion = LastBatchLoss(5, alpha=2.0, temperature=2.0, **kept)
        trainer = language(
            tmp_path, net=Seen(config).double(), criterion=criterion, learning_rate=0.1, from_hidden=from_hidden,
            **options,
        )  # fmt: skip
        seen.clear()
        trainer.train()
        assert {tokens for _, tokens in seen} == {1 if from_hidden else 6}  # that logits were formed of
        return trainer

    plain, hidden = run(False, **options), run(True, **options)
    assert hidden.criterion.buffer.taught == plain.criterion.buffer.taught > 0
    assert (weights(hidden) - weights(plain)).abs().max() < 1e-10
    assert hidden.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-10)


def test_from_hidden_states_in_the_precision_of_the_model(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=5, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    found = []

    class Seen(LastBatchLoss):
        def forward(self, *args, **options):
            found.append(super().forward(*args, **options).detach())
            return found[-1].clone().requires_grad_()  # nothing is learned

    for from_hidden in (False, True):
        set_seed(0)
        criterion = Seen(5, capacity=40)
        language(tmp_path, net=GPT2LMHeadModel(config), criterion=criterion, from_hidden=from_hidden, bf16=True).train()
        if from_hidden:
            assert criterion.buffer.dtype is torch.bfloat16
    plain, hidden = found[: len(found) // 2], found[len(found) // 2 :]
    torch.testing.assert_close(hidden, plain, rtol=1e-6, atol=0)  # both of logits that are rounded to bfloat16


def test_logits_that_are_no_product_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    class Scaled(GPT2LMHeadModel):
        def forward(self, *args, **options):
            outputs = super().forward(*args, **options)
            outputs["logits"] = outputs["logits"] / 2
            return outputs

    config = GPT2Config(vocab_size=5, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ValueError, match="but Scaled scales, caps or computes them otherwise"):
        language(tmp_path, net=Scaled(config), from_hidden=True).train()

    class Adapted(nn.Linear):  # as LoRA: a product of two matrices beside the weight, of which one starts at zero
        def __init__(self):
            super().__init__(8, 5, bias=False)
            self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(5, 2))

        def forward(self, x):
            return super().forward(x) + x @ self.down.T @ self.up.T

    model = GPT2LMHeadModel(config)
    model.lm_head = Adapted()
    with pytest.raises(ValueError, match="but the Adapted has down, up to train as well; leave from_hidden at False"):
        language(tmp_path, net=model, from_hidden=True).train()

    class Own(Language):
        def forward(self, input_ids, output_hidden_states=False, logits_to_keep=0):
            return super().forward(input_ids)

    with pytest.raises(ValueError, match="needs a model of transformers with hidden states .* got Own"):
        language(tmp_path, net=Own(), from_hidden=True).train()


def test_tokens_that_cannot_be_paired_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Language does not tell where they belong; pass shift_labels=True"):
        language(tmp_path, shift=None).train()

    def longer(split):
        return Sequences(split, lambda index: length[0])

    class Growing(Reader):
        def training_step(self, *args):
            length[0] += 1
            return super().training_step(*args)

    length = [6]
    trainer = language(tmp_path, items=longer)
    trainer.__class__ = Growing
    with pytest.raises(ValueError, match=r"as many in every batch, got 6 after 5, .* pad all sequences to one length"):
        trainer.train()


def test_logs_are_means_over_the_updates_since_the_last_log_without_reading_the_device(tmp_path):
    class Read(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                Read.reads += 1
            return func(*args, **(kwargs or {}))

    class Watched(Kept):
        def _items(self, *args):  # the criterion itself examines its arguments on the CPU
            with Read():
                return super()._items(*args)

        def _record(self, *args):
            with Read():
                super()._record(*args)

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            samples = [next(epoch_iterator, None) for _ in range(num_batches)]
            with Read():
                return super().get_batch_samples((s for s in samples if s is not None), num_batches, device)

    options = {"gradient_accumulation_steps": 2, "logging_steps": 4, "max_steps": 8, "logging_nan_inf_filter": True}
    trainer, _, terms = trained(tmp_path, kind=Watched, **options)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and Read.reads == 0
    for entry, part in zip(logs, (terms[:4], terms[4:]), strict=True):
        assert entry["cross_entropy"] == pytest.approx(sum(ce for ce, _ in part) / 4, rel=1e-6)
        assert entry["last_batch"] == pytest.approx(sum(lb for _, lb in part) / 4, rel=1e-6)
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 2 * entry["last_batch"], rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loader_that_mixes_trains_on_both_labels(tmp_path, accumulate):
    loader = ResidentLoader(DATA["train"], 16, mix=Mix(mixup_alpha=0.8), drop_last=False)
    options = {"train_sampling_strategy": "random", "gradient_accumulation_steps": accumulate}
    trainer, want, terms = trained(tmp_path, loader=loader, net=Casting(dropout=0.0), **options)
    assert all(batch["lam"].max() < 1 for batch in trainer.kept) and max(lb for _, lb in terms) > 1e-4
    assert (weights(trainer) - want).abs().max() < 1e-6
    assert trainer.criterion.buffer.mismatched == 0


def test_evaluation_has_the_options_of_the_criterion(tmp_path):
    trainer, _, _ = trained(
        tmp_path, criterion={"weight": CLASS_WEIGHTS, "ignore_index": 1}, label_smoothing_factor=0.1, max_steps=2
    )
    before = trainer.criterion.state_dict()["_extra_state"]
    got = trainer.evaluate()["eval_loss"]
    images, labels = (DATA["test"].images / 255).double(), DATA["test"].targets
    with torch.no_grad():
        logits = trainer.model.eval()(images)["logits"]
        want = F.cross_entropy(logits, labels, weight=CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.1)
    assert got == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(before, trainer.criterion.state_dict()["_extra_state"])


def test_a_smaller_batch_is_found_and_trains_as_if_it_were_given(tmp_path):
    class Small(Net):
        def forward(self, pixel_values):
            if len(pixel_values) > 12:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(pixel_values)

    class Started(Kept):
        def get_train_dataloader(self):
            self.kept, self.begin = [], {k: v.clone() for k, v in self.model.state_dict().items()}
            return super().get_train_dataloader()

    trainer, _, _ = trained(tmp_path, net=Small(dropout=0.0), kind=Started, auto_find_batch_size=True)
    assert [len(batch["labels"]) for batch in trainer.kept] == [6, 12, 12, 12, 12]
    assert trainer.state.train_batch_size == 12 and trainer.criterion.buffer.mismatched == 0
    plain = Net(dropout=0.0).double()
    plain.load_state_dict(trainer.begin)
    want, _ = by_hand([trainer.kept], plain, 1)
    assert (weights(trainer) - want).abs().max() < 1e-12

    class None_(Net):
        def forward(self, pixel_values):
            raise RuntimeError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match="No executable batch size found"):
        make(tmp_path, net=None_, auto_find_batch_size=True).train()


def test_a_found_batch_size_is_resumed(tmp_path):
    class Small(Net):
        def forward(self, pixel_values):
            if len(pixel_values) > 12:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(pixel_values)

    whole = make(tmp_path / "whole", net=Small, auto_find_batch_size=True)
    whole.train()
    resumed = make(tmp_path / "resumed", net=Small, auto_find_batch_size=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert torch.equal(weights(resumed), weights(whole)) and len(resumed.seen[-1]) == len(whole.seen[-1])


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True}])
def test_a_transformer(tmp_path, options):
    """Autocast and activation checkpointing inside a model of the library, labels and unused columns included."""
    from transformers import ViTConfig, ViTForImageClassification

    if "activation_checkpointing" in options and not hasattr(TrainingArguments, "activation_checkpointing"):
        options = {"gradient_checkpointing": True}

    def run(**options):
        config = ViTConfig(
            image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        trainer = make(tmp_path, net=lambda: ViTForImageClassification(config), max_steps=6, **options)
        trainer.train()
        assert trainer.criterion.buffer.taught > 0 and trainer.criterion.buffer.mismatched == 0
        return weights(trainer)

    tolerance = 1e-1 if "bf16" in options else 1e-6
    assert torch.allclose(run(**options), run(), atol=tolerance)


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
    loader = ResidentLoader(DATA["train"], 16)
    loader.load_state_dict({**loader.state_dict(), "step": 3})
    with pytest.raises(RuntimeError, match="the Trainer is at step 0 of the epoch and ResidentLoader at 3"):
        next(iter(as_dataloader(loader)))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


REFUSED = {
    "batch_size must be even": {"per_device_train_batch_size": 15},
    "label_smoothing_factor is 0.1 and criterion.label_smoothing 0.2; set one": {
        "label_smoothing_factor": 0.1, "criterion": {"label_smoothing": 0.2},
    },
    "compute_loss_func would replace the criterion": {"trainer": {"compute_loss_func": lambda *_, **__: None}},
    "criterion.reduction must be 'mean'": {"criterion": {"reduction": "sum"}},
    r"one label per row, got label_names \['start', 'end'\]": {"label_names": ["start", "end"]},
    "group_by_length chooses other rows": {"train_sampling_strategy": "group_by_length"},
    "batch_rebalance chooses other rows": {"train_sampling_strategy": "batch_rebalance"},
    "ignore_data_skip=True begins an epoch anew": {"ignore_data_skip": True},
    "accelerator_config.split_batches=True shards": {"accelerator_config": {"split_batches": True}},
    "accelerator_config.dispatch_batches=True shards": {"accelerator_config": {"dispatch_batches": True}},
    "dataloader_in_order=False": {"dataloader_in_order": False, "dataloader_num_workers": 1},
    "enable_jit_checkpoint saves without telling": {"enable_jit_checkpoint": True},
    "needs a train_dataset with a length .* got Stream": {"items": lambda split: Stream(), "max_steps": 2},
    "train_sampling_strategy='sequential' has no effect on train_loader": {
        "loader": lambda: ResidentLoader(DATA["train"], 16), "train_sampling_strategy": "sequential",
    },
    "auto_find_batch_size=True has no effect on train_loader": {
        "loader": lambda: ResidentLoader(DATA["train"], 16), "auto_find_batch_size": True,
    },
    "data_seed=7 has no effect on train_loader": {
        "loader": lambda: ResidentLoader(DATA["train"], 16), "data_seed": 7,
    },
    "made as rank 1 of 2, but this process is rank 0 of 1": {
        "loader": lambda: ResidentLoader(DATA["train"], 16, rank=1, world_size=2),
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_honoured_is_refused_at_construction(tmp_path, message):
    options = dict(REFUSED[message])
    trainer, criterion = options.pop("trainer", {}), options.pop("criterion", {})
    items, loader = options.pop("items", Items), options.pop("loader", None)
    args = TrainingArguments(
        tmp_path, **{"use_cpu": True, "report_to": [], "per_device_train_batch_size": 16, **options}
    )
    with pytest.raises(ValueError, match=message):
        LastBatchTrainer(
            Net(), args, train_dataset=items("train"), criterion=LastBatchLoss(4, **criterion),
            train_loader=loader and loader(), **trainer,
        )  # fmt: skip


def test_models_of_another_kind_and_parallel_parts_are_refused(tmp_path):
    def build(net, kind=LastBatchTrainer, **changes):
        args = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
        assert args.n_gpu == 0
        for name, value in changes.items():
            setattr(args, name, value)
        return kind(net, args, train_dataset=Items("train"), criterion=LastBatchLoss(4))

    class Regression(Net):
        config = SimpleNamespace(problem_type="regression", to_json_string=lambda: "")

    with pytest.raises(ValueError, match="one class per row, got model.config.problem_type 'regression'"):
        build(Regression())
    with pytest.raises(ValueError, match=r"not_distributed \(n_gpu = 2\) splits a batch after it was made"):
        build(Net(), _n_gpu=2)

    class Parallel(Net):
        _tp_size = 2

    with pytest.raises(ValueError, match="1 ranks train on 0 different batches"):
        build(Parallel())

    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    learnable = LastBatchLoss(4, impl="torch", alpha=nn.Parameter(torch.ones(())))
    with pytest.raises(ValueError, match="the criterion has parameters, which the Trainer's optimizer does not train"):
        LastBatchTrainer(Net(), args, train_dataset=Items("train"), criterion=learnable)

    class Sampled(LastBatchTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with pytest.raises(ValueError, match="_get_train_sampler is not called"):
        build(Net(), Sampled)


def test_names_that_the_trainer_adds_are_not_taken_from_the_batch(tmp_path):
    class Named(Items):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "ids": index}

    with pytest.raises(ValueError, match="the batch of data_collator has ids already"):
        make(tmp_path, items=Named, remove_unused_columns=False, net=Net).train()


def test_a_batch_without_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a batch has no 'answer', only pixel_values, labels, ids, num_old; set args"):
        make(tmp_path, label_names=["answer"], loader=ResidentLoader(DATA["train"], 16)).train()


def test_other_label_names_are_counted(tmp_path):
    class Renamed(Doubles):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {"pixel_values": item["pixel_values"], "answer": item["labels"]}

    def run(items, **options):
        set_seed(0)
        args = TrainingArguments(
            tmp_path, use_cpu=True, report_to=[], max_steps=3, gradient_accumulation_steps=3, save_strategy="no",
            per_device_train_batch_size=16, learning_rate=0.5, optim="sgd", disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = LastBatchTrainer(
            Net(dropout=0.0).double(), args, train_dataset=items("train", range(5, 20)), criterion=LastBatchLoss(4)
        )
        trainer.train()
        return weights(trainer)

    assert torch.equal(run(Doubles), run(Renamed, label_names=["answer"]))


# The end frees the model that DistributedDataParallel wraps and then destroys the process group: gloo's threads abort a
# process that exits while they run.
def on_two_ranks(script, folder, *arguments):
    """Run a script that makes `trainer` on two ranks, with ``folder`` and what follows as its arguments."""
    path = folder / "ranked.py"
    path.write_text(textwrap.dedent(script) + textwrap.dedent(LEAVE))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", path, folder, *arguments]
    python(*launch, cwd=folder, PYTHONPATH=f"{environment()['PYTHONPATH']}:{ROOT / 'tests'}")


LEAVE = """
    torch.distributed.barrier()
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    torch.distributed.destroy_process_group()
"""


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
"""


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(tmp_path):
    for checkpoint in ([], [tmp_path / "whole" / "checkpoint-3"]):
        on_two_ranks(SCRIPT, tmp_path, *checkpoint)
    assert len(list((tmp_path / "whole" / "checkpoint-3").glob("dlb_fast_*.pt"))) == 2
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "resumed"))
    assert torch.equal(whole, resumed)


RANKED = """
    import gc, sys, torch
    import test_integrations_hf as case
    trainer, _, _ = case.trained(
        sys.argv[1], data=(range(3, 20),), per_device_train_batch_size=8, gradient_accumulation_steps=2,
        ddp_backend="gloo",
    )
    rank = trainer.args.process_index
    torch.save((trainer.kept, case.weights(trainer), trainer.state.log_history), f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_train_and_log_as_a_plain_loop_over_the_rows_of_both(tmp_path):
    """Most labels of one rank are ignored: the cross entropy divides by those of both."""
    on_two_ranks(RANKED, tmp_path)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    set_seed(0)
    want, terms = by_hand([kept for kept, _, _ in saved], Net(dropout=0.0).double(), 2)
    for _, got, _ in saved:
        assert (got - want).abs().max() < 1e-6
    logs = [entry for entry in saved[0][2] if "loss" in entry]
    for entry, (ce, lb) in zip(logs, terms, strict=True):
        assert entry["cross_entropy"] == pytest.approx(ce, rel=1e-5)
        assert entry["last_batch"] == pytest.approx(lb, rel=1e-5, abs=1e-12)
        assert entry["loss"] == pytest.approx(ce + 2 * lb, rel=1e-5)
