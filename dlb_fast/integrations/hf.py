"""Hugging Face `Trainer`: `LastBatchTrainer` trains with `LastBatchLoss`, and its checkpoints resume exactly.

The criterion stays outside the model, so a saved model is the model alone. Evaluation is plain cross entropy. Every
rank adds one small file to a checkpoint folder, `dlb_fast_RANK.pt`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dlb_fast.data import Batch, OverlapBatchSampler, SampleIndex
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import check_ranks, reset, stream_of
from dlb_fast.losses import LastBatchLoss

__all__ = ["LastBatchCallback", "LastBatchTrainer", "as_dataloader"]

# What a batch holds for the criterion beside the labels.
_GIVEN = ("ids", "num_old", "target_b", "lam")
_hf: Any = need("transformers", "pip install 'dlb_fast[hf]'")


class LastBatchTrainer(_hf.Trainer):
    """`transformers.Trainer` with self-distillation from the last mini-batch.

    `per_device_train_batch_size` is the rows the model sees, so it must be even; an epoch has twice the usual number of
    steps. With gradient accumulation the cross entropy is that of the whole accumulated batch, over all ranks if
    `average_tokens_across_devices`; the last-batch term is the mean over its micro-batches, each learning from the
    micro-batch before it. Beside `loss` the Trainer logs `cross_entropy` and `last_batch` (without alpha), means over
    the same updates. Evaluation is torch's cross entropy with the criterion's options.

    With labels ``(B, T)`` and logits ``(B, T, C)`` the rows of the loss are tokens, whose ids are made of the ids of
    their sequences and their positions. A label of ``ignore_index`` takes a token out of both terms. T is the same in
    every batch.

    Args:
        *args: as for `Trainer`.
        criterion: `LastBatchLoss`. `args.label_smoothing_factor` becomes its `label_smoothing`.
        train_loader: a loader of `dlb_fast.data`, or a DataLoader with an `OverlapBatchSampler`; None makes such a
            DataLoader from `train_dataset`, `data_collator` and `args`.
        image_key: the model's argument for images, used with loaders that yield `Batch`.
        shift_labels: with labels ``(B, T)``, whether the logits of a token predict the label after it. None: they do
            in the causal language models of transformers; with other models say it.
        from_hidden: train from the last hidden states and the output embeddings, without the logits of a batch in
            memory; for language models of transformers that take `logits_to_keep`. Evaluation forms the logits; its
            `eval_loss` is the Trainer's mean over batches, where a token of a batch with more padding counts for more.
        **options: as for `Trainer`. The labels are found by `args.label_names`.

    Raises:
        TypeError: a criterion or a loader of another kind.
        ValueError: an odd batch size, a loader made for other ranks, a checkpoint saved with other data or options, or
            an option that a last-batch term cannot be trained with.

    Examples: ``examples/hf_images.py``, ``examples/hf_language_model.py``.
    """

    _train_batch_size: int

    def __init__(
        self,
        *args: Any,
        criterion: LastBatchLoss,
        train_loader: Any = None,
        image_key: str = "pixel_values",
        shift_labels: bool | None = None,
        from_hidden: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(criterion, LastBatchLoss):
            raise TypeError(f"LastBatchTrainer: criterion must be a LastBatchLoss, got {type(criterion).__name__}")
        given: Any = args[1] if len(args) > 1 else options.get("args")
        smoothing = getattr(given, "label_smoothing_factor", 0.0)
        if smoothing:  # the criterion smooths; the Trainer would ask every model for a config
            given.label_smoothing_factor = 0.0
        try:
            super().__init__(*args, **options)
        finally:
            if smoothing:
                given.label_smoothing_factor = smoothing
        self.criterion = criterion.to(self.args.device)
        self.train_loader = train_loader
        self.image_key = image_key
        self.shift_labels = self._predicts_the_next() if shift_labels is None else shift_labels
        self.from_hidden = from_hidden
        self._seen_head = False
        # The Trainer looks for the names in the model's forward, which takes no labels here.
        found = list(getattr(self, "label_names", None) or ["labels"])
        self.label_names: list[str] = ["labels"] if "labels" in found and self.args.label_names is None else found
        # With this the Trainer does not divide the loss by the number of micro-batches.
        self.model_accepts_loss_kwargs = True
        self._check()
        if smoothing:
            criterion.label_smoothing = smoothing
        self.memory = LastBatchCallback(self.criterion)
        self.add_callback(self.memory)
        # The terms of the updates since the last log, and the update they begin after.
        self._terms = torch.zeros(2, device=self.args.device)
        self._logged = 0
        self._tokens: int | None = None  # of a sequence of the batch before

    def _check(self) -> None:
        """Refuse what would be ignored, or would separate repeated rows from the rows they repeat."""
        args, data, loader = self.args, self.train_dataset, self.train_loader
        name = "LastBatchTrainer"
        for wrong, why in self._refusals():
            if wrong:
                raise ValueError(f"{name}: {why}")
        if loader is not None:
            check_ranks(loader, args.process_index, args.world_size)  # raises for a loader of another kind
            seed = stream_of(loader).plan.seed
            for option, got, wanted in (
                ("train_sampling_strategy", getattr(args, "train_sampling_strategy", "random"), "random"),
                ("auto_find_batch_size", args.auto_find_batch_size, False),
                ("data_seed", args.data_seed, args.data_seed if args.data_seed == seed else None),
            ):
                if got != wanted:
                    raise ValueError(
                        f"{name}: {option}={got!r} has no effect on train_loader, which has its own order and batch "
                        f"size; make the loader so, and leave {option} at {wanted!r}"
                    )
        elif data is not None:
            if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
                raise ValueError(
                    f"{name}: needs a train_dataset with a length and items by index, from which it repeats rows, got "
                    f"{type(data).__name__}; use a map-style dataset, or pass train_loader="
                )
            self._sampler()  # raises for an odd batch size

    def _refusals(self) -> Iterator[tuple[Any, str]]:
        """Which options cannot be honoured, and why."""
        args, criterion = self.args, self.criterion
        smoothing = args.label_smoothing_factor
        yield (
            smoothing and criterion.label_smoothing not in (0, smoothing),
            f"label_smoothing_factor is {smoothing} and criterion.label_smoothing {criterion.label_smoothing}; set one",
        )
        yield (
            self.compute_loss_func is not None,
            "compute_loss_func would replace the criterion; override compute_loss, or use the plain Trainer",
        )
        yield (
            criterion.reduction != "mean",
            f"criterion.reduction must be 'mean', which the Trainer averages over batches, got {criterion.reduction!r}",
        )
        yield (
            next(criterion.parameters(), None) is not None,
            "the criterion has parameters, which the Trainer's optimizer does not train and no checkpoint holds; make "
            "alpha and temperature numbers or plain tensors",
        )
        yield (
            len(self.label_names) != 1,
            f"the criterion takes one label per row, got label_names {self.label_names}; set args.label_names to one",
        )
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        yield (
            problem in ("regression", "multi_label_classification"),
            f"the criterion needs one class per row, got model.config.problem_type {problem!r}",
        )
        order = getattr(args, "train_sampling_strategy", "random")
        if getattr(args, "group_by_length", False):
            order = "group_by_length"
        yield (
            order not in ("random", "sequential"),
            f"{order} chooses other rows for every batch, so no row would be repeated; use 'random' or 'sequential'",
        )
        yield (
            type(self)._get_train_sampler is not _hf.Trainer._get_train_sampler,
            "_get_train_sampler is not called, because batches of repeated and new rows have a sampler of their own; "
            "pass train_loader=",
        )
        yield (
            args.ignore_data_skip,
            "ignore_data_skip=True begins an epoch anew, without the rows that the next batch repeats; leave it False: "
            "skipping needs no time here",
        )
        mode = args.parallel_mode.value
        yield (
            mode not in ("not_parallel", "distributed", "sagemaker_data_parallel"),
            f"parallel mode {mode} (n_gpu = {args.n_gpu}) splits a batch after it was made, and every part needs its "
            "own teacher; start one process per device with torchrun",
        )
        ranks = self.get_total_train_batch_size(args) // (self._train_batch_size * args.gradient_accumulation_steps)
        yield (
            ranks != args.world_size,
            f"{args.world_size} ranks train on {ranks} different batches (tensor, context or sequence parallelism); "
            "here every rank needs batches of its own",
        )
        config = args.accelerator_config
        for option in ("split_batches", "dispatch_batches"):
            yield (
                getattr(config, option, None),
                f"accelerator_config.{option}=True shards batches after they were made, which separates repeated rows "
                "from the rows they repeat; leave it False",
            )
        yield (
            args.dataloader_num_workers > 0 and not getattr(args, "dataloader_in_order", True),
            "dataloader_in_order=False delivers a batch before the one whose rows it repeats; leave it True",
        )
        yield (
            getattr(args, "past_index", -1) >= 0,
            "past_index feeds a batch with the outputs of another one; leave it at -1",
        )
        yield (
            getattr(args, "enable_jit_checkpoint", False),
            "enable_jit_checkpoint saves without telling callbacks, so not the criterion; leave it False",
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The overlapping batches as a DataLoader. It is not prepared, since the sampler knows its rank."""
        # What auto_find_batch_size tries after a failure may be odd.
        self._train_batch_size = max(2, self._train_batch_size // 2 * 2)
        loader = self._overlapping() if self.train_loader is None else self.train_loader
        check_ranks(loader, self.args.process_index, self.args.world_size)
        self.memory.loader = loader
        return as_dataloader(loader, self.image_key)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """As `Trainer.train`; a resumed run also loads the criterion and the position in the data."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = need("transformers.trainer_utils", "").get_last_checkpoint(self.args.output_dir)
        self.memory.folder = Path(folder) if folder else None
        self._logged = -1  # the terms of an earlier training are dropped at its first batch
        self._tokens = None
        return super().train(resume_from_checkpoint, *args, **options)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | None]:
        """The micro-batches of one update, and what the mean of their cross entropy divides by, over all of them.

        As `Trainer.get_batch_samples`, but counted by the criterion's `ignore_index` and `weight`.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        name = self.label_names[0]
        if name not in batches[0]:
            raise ValueError(
                f"LastBatchTrainer: a batch has no {name!r}, only {', '.join(batches[0])}; set args.label_names to the "
                "name of its labels"
            )
        total = torch.stack([self._items(batch, device) for batch in batches]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return batches, total

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the criterion; in evaluation that is torch's cross entropy, and nothing is remembered."""
        labels = self._labels(inputs)
        dropped = (*_GIVEN, "skip_logits", *self.label_names)
        given = {name: inputs.get(name) for name in _GIVEN}
        own = {name: value for name, value in inputs.items() if name not in dropped}
        if self.from_hidden and model.training:
            outputs = model(**own, output_hidden_states=True, logits_to_keep=1)
            logits, head = self._hidden(model, outputs)
            given |= head
        else:
            outputs = model(**own)
            logits = _logits(outputs)
        rows, targets = logits, labels
        if logits.dim() == 3 and _of_tokens(labels):
            if model.training:
                self._check_length(labels.shape[1])
            rows, targets, given = _token_rows(
                logits[:, :-1] if self.shift_labels else logits, labels, given, self.criterion.ignore_index
            )
        self.criterion.train(model.training)
        if model.training:
            # The Trainer leaves autocast with the model; the product of the layer belongs to it as well.
            with self.accelerator.autocast() if "head_weight" in given else contextlib.nullcontext():
                loss = self._training_loss(rows, targets, given, inputs, num_items_in_batch)
        else:
            loss = self.criterion(rows, targets)
        return (loss, outputs if isinstance(outputs, Mapping) else {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As `Trainer.log`, with the terms beside the loss of training."""
        if "loss" in logs and self.is_in_train:
            terms = self.accelerator.gather(self._terms[None]).mean(0)
            ce, lb = (terms / max(1, self.state.global_step - self._logged)).tolist()
            logs |= {"cross_entropy": ce, "last_batch": lb}
            self._terms, self._logged = torch.zeros_like(terms), self.state.global_step
        super().log(logs, *args, **options)

    def _hidden(self, model: nn.Module, outputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """The last hidden states, and the layer that makes logits of them."""
        unwrapped: Any = self.accelerator.unwrap_model(model)
        head = unwrapped.get_output_embeddings() if hasattr(unwrapped, "get_output_embeddings") else None
        states = outputs.get("hidden_states")
        if head is None or states is None:
            raise ValueError(
                "LastBatchTrainer: from_hidden needs a model of transformers with hidden states and output embeddings, "
                f"got {type(unwrapped).__name__}; leave from_hidden at False"
            )
        hidden, weight, bias = states[-1], head.weight, getattr(head, "bias", None)
        if not self._seen_head:
            others = [n for n, p in head.named_parameters() if p.requires_grad and p is not weight and p is not bias]
            if weight.is_leaf and others:  # of an adapter, which often starts as one that changes nothing
                raise ValueError(
                    f"LastBatchTrainer: from_hidden trains the weight and bias of the output embeddings alone, but the "
                    f"{type(head).__name__} has {', '.join(others)} to train as well; leave from_hidden at False"
                )
            with torch.no_grad():
                product, last = nn.functional.linear(hidden[:, -1:], weight, bias), outputs["logits"]
            off = (product - last).abs().max() / last.abs().max().clamp(min=1e-30)
            capped = getattr(getattr(unwrapped, "config", None), "final_logit_softcapping", None)
            if capped or product.shape != last.shape or off > max(0.01, 8 * torch.finfo(product.dtype).eps):
                raise ValueError(
                    "LastBatchTrainer: from_hidden needs logits that are the product of the last hidden states and the "
                    f"output embeddings, but {type(unwrapped).__name__} scales, caps or computes them otherwise; leave "
                    "from_hidden at False"
                )
            self._seen_head = True
        return hidden, {"head_weight": weight, "head_bias": bias}

    def _predicts_the_next(self) -> bool | None:
        """Whether the logits of a token predict the next one; None where the model does not tell."""
        names = need("transformers.models.auto.modeling_auto", "").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        model = self.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
        return True if type(model).__name__ in names.values() else None

    def _labels(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The labels as the logits predict them."""
        labels: torch.Tensor = batch[self.label_names[0]]
        if not _of_tokens(labels):
            return labels
        if self.shift_labels is None:
            raise ValueError(
                f"LastBatchTrainer: labels have shape {tuple(labels.shape)}, one per token, and "
                f"{type(self.model).__name__} does not tell where they belong; pass shift_labels=True if the logits of "
                "a token predict the label after it, as in a causal language model, else False"
            )
        return labels[:, 1:] if self.shift_labels else labels

    def _check_length(self, tokens: int) -> None:
        """A row learns from the same row of the batch before, so both have as many tokens to a sequence."""
        if self._tokens not in (None, tokens):
            raise ValueError(
                f"LastBatchTrainer: the labels of a sequence must be as many in every batch, got {tokens} after "
                f"{self._tokens}, so tokens would not meet their own logits of the batch before; pad all sequences to "
                'one length (padding="max_length")'
            )
        self._tokens = tokens

    def _items(self, batch: Mapping[str, Any], device: torch.device) -> torch.Tensor:
        """What the mean of the cross entropy divides by, as in torch: rows that count, or the sum of their weights."""
        labels, second = self._labels(batch).to(device), batch.get("target_b")
        if labels.is_floating_point():  # probabilities
            return torch.full((), labels.shape[0], dtype=torch.float32, device=device)
        ignored, weight = self.criterion.ignore_index, self.criterion.weight
        counted = labels != ignored
        if second is not None:
            counted = counted & (second.to(device) != ignored)
        if weight is None or second is not None:
            return counted.sum(dtype=torch.float32)
        # A label out of range becomes a NaN in the loss, not an index that ends the process.
        return (weight[labels.where(counted, 0).clamp(0, len(weight) - 1).long()] * counted).sum()

    def _training_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, given: dict[str, Any], inputs: dict[str, Any], items: Any
    ) -> Any:
        criterion, micro_batches = self.criterion, self.current_gradient_accumulation_steps
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        if items is None or micro_batches * ranks == 1:  # without a count the Trainer divides by the micro-batches
            loss, share = criterion(logits, labels, **given), 1 / micro_batches
        else:
            # share * (CE + alpha' KL) = CE summed over these rows / items + alpha KL / micro_batches
            share = self._items(inputs, labels.device) * ranks / items
            # Without a label that counts, the cross entropy is 0 and any share will do.
            share = torch.where(share > 0, share, 1.0)
            alpha = criterion.alpha
            criterion.alpha = alpha / (micro_batches * share)
            try:
                loss = share * criterion(logits, labels, **given)
            finally:
                criterion.alpha = alpha
        self._record(loss.detach(), share, micro_batches)
        return loss

    def _record(self, loss: torch.Tensor, share: Any, micro_batches: int) -> None:
        """Add the terms of a micro-batch to those of the updates since the last log, on the device."""
        step = self.state.global_step
        if self._logged < 0:
            self._terms, self._logged = torch.zeros(2, device=loss.device), step
        parts = self.criterion.parts
        new = torch.stack([parts.ce * share, parts.lb / micro_batches]).to(self._terms)
        if self.args.logging_nan_inf_filter:  # as the Trainer does with the loss
            new = torch.where(loss.isfinite(), new, self._terms / (1 + step - self._logged))
        self._terms = self._terms + new

    def _sampler(self) -> OverlapBatchSampler:
        args = self.args
        return OverlapBatchSampler(
            len(self.train_dataset),
            self._train_batch_size,
            shuffle=getattr(args, "train_sampling_strategy", "random") != "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            world_size=args.world_size,
            drop_last=args.dataloader_drop_last,
        )

    def _overlapping(self) -> DataLoader[Any]:
        args, dataset = self.args, self.train_dataset
        if dataset is None:
            raise ValueError("LastBatchTrainer: training needs a train_dataset, or train_loader=")
        workers = args.dataloader_num_workers
        sampler = self._sampler()
        return DataLoader(
            _WithIndex(dataset),
            batch_sampler=sampler,
            collate_fn=partial(
                _collate, self._get_collator_with_removed_columns(self.data_collator, description="Training")
            ),
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers > 0 else None,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None) if workers > 0 else None,
            # The seed of the workers is drawn from here. From torch's global generator, where a resumed run makes one
            # iterator more, it would change the dropout.
            generator=torch.Generator().manual_seed(sampler.plan.seed + args.process_index),
        )


class LastBatchCallback(_hf.TrainerCallback):
    """Saves the criterion and the position in the data with every checkpoint, and loads them when training resumes.

    `LastBatchTrainer` has one. With another Trainer, return `as_dataloader(loader)` from `get_train_dataloader` and add
    `LastBatchCallback(criterion, loader, folder)`.

    Args:
        criterion: `LastBatchLoss`.
        loader: a loader of `dlb_fast.data`, or a DataLoader with an `OverlapBatchSampler`.
        folder: the checkpoint that is passed to `train`; None starts anew.

    Raises:
        ValueError: a checkpoint saved with other data or options.
    """

    def __init__(self, criterion: nn.Module, loader: Any = None, folder: str | os.PathLike[str] | None = None) -> None:
        self.criterion = criterion
        self.loader = loader
        self.folder = None if folder is None else Path(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Continue where the checkpoint was made, or start anew."""
        if state.global_step and args.ignore_data_skip:
            raise ValueError(
                "LastBatchCallback: ignore_data_skip=True begins an epoch anew, without the rows that the next batch "
                "repeats; leave it False: skipping needs no time here"
            )
        self.criterion.train()
        position = self._position(args, state)
        path = None if self.folder is None else self._file(self.folder, args)
        if path is not None and path.is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            stream_of(self.loader).load_state_dict(saved["loader"])
            self.criterion.load_state_dict(saved["criterion"])
            return
        reset(self.criterion)
        stream_of(self.loader).load_state_dict(position)
        if path is not None:
            warnings.warn(
                f"LastBatchCallback: {path} is missing (saved without this callback, or by another number of ranks); "
                f"the data continue at epoch {position['epoch']}, step {position['step']}, and the criterion starts "
                "empty",
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write the file of this rank, whole or not at all."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_hyper_param_search and not folder.is_dir():
            return  # the checkpoint is in the folder of a trial
        folder.mkdir(parents=True, exist_ok=True)
        path = self._file(folder, args)
        unfinished = path.with_suffix(".tmp")
        with open(unfinished, "wb") as file:
            torch.save({"criterion": self.criterion.state_dict(), "loader": self._position(args, state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def _position(self, args: Any, state: Any) -> dict[str, Any]:
        """The state of the stream after so many updates. A DataLoader with workers has drawn more than that."""
        updates = -(-len(self.loader) // args.gradient_accumulation_steps)  # per epoch
        epoch, update = divmod(state.global_step, updates)
        step = update * args.gradient_accumulation_steps
        return {**stream_of(self.loader).state_dict(), "epoch": epoch, "step": step}

    @staticmethod
    def _file(folder: Path, args: Any) -> Path:
        return folder / f"dlb_fast_{args.process_index}.pt"


def as_dataloader(loader: Any, image_key: str = "pixel_values") -> DataLoader[Any]:
    """A loader as a torch DataLoader of dicts, which `Trainer` wants.

    A Trainer that resumes asks the batch sampler for the batches it skips. Here the sampler yields step numbers only,
    so `loader`, which was placed by `load_state_dict`, is not asked for them. Every batch that it yields is checked
    against the step the Trainer is at.

    Args:
        loader: a loader of `dlb_fast.data`, or a DataLoader with an `OverlapBatchSampler`. A `Batch` becomes
            `{image_key, "labels", "ids", "num_old"}`, with `"target_b"` and `"lam"` if its images are mixed; a mapping
            passes as it is.
        image_key: the model's argument for images.
    """
    batches = _Batches(loader, image_key)
    return DataLoader(batches, batch_sampler=_Steps(batches), collate_fn=_first)


class _Batches(Dataset[Any]):
    """`dataset[step]` is the next batch of the loader."""

    def __init__(self, loader: Any, image_key: str) -> None:
        self.loader = loader
        self.image_key = image_key
        self.batches: Iterator[Any] = iter(())
        self.expected = 0

    def __len__(self) -> int:
        return int(stream_of(self.loader).plan.length)  # samples: the Trainer prints it

    def restart(self) -> None:
        # After an epoch's last batch the position is that epoch's end.
        self.expected = stream_of(self.loader).state_dict()["step"] % len(self.loader)
        self.batches = iter(self.loader)

    def __getitem__(self, step: int) -> dict[str, Any]:
        if step != self.expected:
            raise RuntimeError(
                f"as_dataloader: the Trainer is at step {step} of the epoch and {type(self.loader).__name__} at "
                f"{self.expected}; load the loader's state before training (LastBatchCallback does)"
            )
        batch = next(self.batches)
        self.expected += 1
        if isinstance(batch, Batch):
            mixed = {} if batch.lam is None else {"target_b": batch.target_b, "lam": batch.lam}
            own = {"labels": batch.targets, "ids": batch.ids, "num_old": batch.num_old}
            return {self.image_key: batch.images, **own, **mixed}
        if isinstance(batch, Mapping):
            return dict(batch)
        raise TypeError(f"as_dataloader: expected batches that are Batch or a mapping, got {type(batch).__name__}")


class _Steps:
    """A batch sampler that yields the step numbers of an epoch."""

    def __init__(self, batches: _Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches.loader)

    def __iter__(self) -> Iterator[list[int]]:
        self.batches.restart()
        for step in range(len(self)):
            yield [step]


class _WithIndex(Dataset[Any]):
    """Items together with the `SampleIndex` that asked for them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: SampleIndex) -> tuple[SampleIndex, Any]:
        return index, self.dataset[int(index)]


def _collate(collator: Any, rows: list[tuple[SampleIndex, Any]]) -> dict[str, Any]:
    batch = dict(collator([item for _, item in rows]))
    if taken := {"ids", "num_old"} & batch.keys():
        raise ValueError(
            f"LastBatchTrainer: the batch of data_collator has {', '.join(sorted(taken))} already, which this Trainer "
            "adds for the criterion; rename it"
        )
    indices = [index for index, _ in rows]
    return {**batch, "ids": torch.tensor([int(i) for i in indices]), "num_old": sum(i.view for i in indices)}


def _of_tokens(labels: torch.Tensor) -> bool:
    return labels.dim() == 2 and not labels.is_floating_point()


def _token_rows(
    logits: torch.Tensor, labels: torch.Tensor, given: dict[str, Any], ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What the criterion is given, with rows of tokens, from logits ``(B, T, C)`` and labels ``(B, T)``."""
    tokens, ids, old = labels.shape[1], given["ids"], given["num_old"]
    if ids is not None:  # the same for the same token, whatever T is
        ids = (ids[:, None] * 2**32 + torch.arange(tokens, device=ids.device)).flatten()
    old = None if old is None else old * tokens
    mask = (labels != ignore_index).flatten()
    return logits.flatten(0, 1), labels.flatten(), {**given, "ids": ids, "num_old": old, "kd_mask": mask}


def _first(rows: list[Any]) -> Any:
    return rows[0]


def _logits(outputs: Any) -> torch.Tensor:
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"LastBatchTrainer: the model has to return logits, got {type(outputs).__name__}")
    return logits
