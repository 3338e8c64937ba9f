"""timm's model, optimiser, EMA and checkpoints with the last mini-batch. What changed against timm's train script:

1. the task: `LastBatchTask(model, LastBatchLoss(10))` in place of `ClassificationTask(model, ...)`,
2. the loader: `task.batches(...)` around one of `dlb_fast.data`, in place of `create_loader(...)`.

In timm's own `train.py` these are the same two lines, after `task = ...`, with `args=args` for the task, which then
takes `--mixup`, `--smoothing` and the like over; it saves its state with the model. The run is stopped after an epoch,
where timm resumes, and continued in new objects; the weights end bit-identical.
"""

import argparse
import tempfile

import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver

from dlb_fast import LastBatchLoss
from dlb_fast.data import EvalLoader, ResidentLoader, digits
from dlb_fast.integrations.timm import LastBatchTask


def train(folder: str, epochs: int, resume: str = "") -> LastBatchTask:
    torch.manual_seed(0)
    model = create_model("test_resnet", num_classes=10, in_chans=1)
    task = LastBatchTask(model, LastBatchLoss(num_classes=10), verbose=False)  # changed
    loader = task.batches(ResidentLoader(digits("train"), batch_size=64))  # changed
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=3e-3)
    start = resume_task_checkpoint(task, resume, optimizer, log_info=False) if resume else 0
    task.setup_ema(decay=0.95)
    arguments = argparse.Namespace(model="test_resnet")
    saver = CheckpointSaver(
        model, optimizer, args=arguments, task=task, checkpoint_dir=folder, recovery_dir=folder, max_history=1
    )
    for epoch in range(start, epochs):
        loader.set_epoch(epoch)
        task.get_trainable_module().train()
        for images, targets in loader:
            result = task(images, targets)  # loss, output, task_loss, kd_loss
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            task.update_ema()
        saver.save_checkpoint(epoch, metric=-result["loss"].item())
    return task


def accuracy(task: LastBatchTask) -> float:
    model = task.get_eval_model().eval()
    with torch.inference_mode():
        right = sum((model(b.images).argmax(1) == b.targets).sum().item() for b in EvalLoader(digits("test"), 256))
    return right / len(digits("test"))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        whole = train(first, epochs=3)
        train(second, epochs=2)
        resumed = train(second, epochs=3, resume=f"{second}/last.pth.tar")
    ends = [task.get_trainable_module().state_dict().values() for task in (whole, resumed)]
    same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    print(f"test accuracy {accuracy(whole):.3f}; stopped and resumed: {'bit-identical' if same else 'DIFFERENT'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
