"""The Composer algorithm with a real Composer Trainer (test_examples runs and resumes one as well)."""

from __future__ import annotations

import pytest
import torch
from frameworks import reason_against
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dlb_fast import LastBatchLoss, fused_lb_loss
from dlb_fast.data import OverlapBatchSampler

if REASON := reason_against("composer"):
    pytest.skip(REASON, allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

from composer import Trainer  # noqa: E402
from composer.models import ComposerModel  # noqa: E402

from dlb_fast.integrations import composer as ours  # noqa: E402

DATA = TensorDataset(torch.randn(56, 8), torch.randint(0, 4, (56,)), torch.arange(56))


class Net(ComposerModel):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])


def trainer(folder, loader=None, rows=16, **options):
    net = Net()
    loader = loader or DataLoader(DATA, batch_sampler=OverlapBatchSampler(DATA, 16))
    made = Trainer(
        model=net, train_dataloader=loader, algorithms=[ours.LastBatch(LastBatchLoss(4), ids_key=2)], seed=0,
        optimizers=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), max_duration="3ep", device="cpu",
        device_train_microbatch_size=rows, save_folder=str(folder), save_interval="5ba", save_filename="{batch}.pt",
        save_latest_filename=None, progress_bar=False, **options,
    )  # fmt: skip
    return net, made


def test_resume_is_bit_identical(tmp_path):
    net, whole = trainer(tmp_path / "whole")
    whole.fit()
    whole.close()
    assert net.last_batch.buffer.mismatched == 0 and net.last_batch.parts.lb > 0
    for batch in (5, 10, 15, 20):
        again, resumed = trainer(tmp_path / str(batch), load_path=str(tmp_path / "whole" / f"{batch}.pt"))
        resumed.fit()
        resumed.close()
        assert again.last_batch.buffer.mismatched == 0
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True)), batch


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="device_train_microbatch_size must be at least 16, .* got 4"):
        trainer(tmp_path / "a", rows=4)[1].fit()
    with pytest.raises(TypeError, match="expected a loader of dlb_fast.data, .* got DataLoader"):
        trainer(tmp_path / "b", DataLoader(DATA, batch_size=16))[1].fit()
    with pytest.raises(ValueError, match="the model computes the cross entropy"):
        ours.LastBatch(LastBatchLoss(4, label_smoothing=0.1))
    with pytest.raises(TypeError, match="criterion must be a LastBatchLoss, got Linear"):
        ours.LastBatch(nn.Linear(1, 1))
    assert ours.fused_lb_loss is fused_lb_loss
