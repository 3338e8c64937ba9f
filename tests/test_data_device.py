"""Every loader refuses a device that is not there in the project's words, not in torch's."""

import pytest

from dlb_fast.data import EvalLoader, OverlapLoader, ResidentLoader, open_dataset


@pytest.mark.parametrize("loader", [ResidentLoader, OverlapLoader, EvalLoader], ids=lambda loader: loader.__name__)
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:99", "'cuda:99' does not exist, torch .* sees .* CUDA devices; pass device='cpu'"),
        ("gpu", "expected cpu, cuda or cuda:N, got 'gpu'"),
        (1.5, "expected cpu, cuda or cuda:N, got 1.5"),
    ],
)
def test_a_device_that_is_not_there(loader, device, said):
    with pytest.raises(ValueError, match=f"{loader.__name__}: device: {said}"):
        loader(open_dataset("synthetic:8,2,8"), 4, device=device)
