"""Backbones: parameter counts worked out by hand, shapes, and the errors of `create_model`."""

import sys
import types

import pytest
import torch

from dlb_fast.train.models import MODELS, create_model, list_models

# Convolutions have no bias unless said; a BatchNorm over c channels has 2c parameters.
#
# resnet32a (He et al. option A, C=10; published as 0.46 M):
#   stem 3*16*9 + 32 = 464; stage 1: 5 * 2 * (16*16*9 + 32) = 23360
#   stage 2: (16*32*9 + 64) + 9 * (32*32*9 + 64) = 4672 + 83520 = 88192
#   stage 3: (32*64*9 + 128) + 9 * (64*64*9 + 128) = 18560 + 332928 = 351488; fc 650  -> 464154
# resnet32 (option B): + (16*32 + 64) + (32*64 + 128) = 2752  -> 466906; C=100: + 90*65 -> 472756
# resnet110a: stem 464; 36*(2304+32) = 84096; 4672 + 35*9280 = 329472; 18560 + 35*36992 = 1313280;
#   fc 650 -> 1727962 (published as 1.7 M)
# resnet18 at 32x32: stem 3*64*9 + 128 = 1856; stage 1: 4*(64*64*9 + 128) = 147968;
#   stage 2: 64*128*9+256 + 3*(128*128*9+256) + 64*128+256 = 525568; stage 3: 2099712; stage 4: 8393728
#   fc 5130 -> 11173962 (published as 11.17 M)
# vgg16: 13 convolutions with bias 14714688 (as in torchvision's vgg16.features), BatchNorm
#   2*(2*64+2*128+3*256+6*512) = 8448, classifier 2*(512*512+512) + 5130 = 530442 -> 15253578
# vgg19: 20024384 + 2*(2*64+2*128+4*256+8*512) + 530442 = 20024384 + 11008 + 530442 -> 20565834
# densenet-BC layer with m inputs, k=12: 2m + 48m + 96 + 48*12*9 = 50m + 5280;
#   L=40: block 1, m = 24..84 step 12, sum 324: 16200 + 31680 = 47880; norm+transition 96: 192 + 4608;
#   block 2, m = 48..108, sum 468: 55080; transition 120: 240 + 7200; block 3, m = 60..120, sum 540:
#   58680; final norm 264; fc 1330; stem 648 -> 47880+4800+55080+7440+58680+264+1330+648 = 176122
# densenet100_12, published as 0.8 M: 769162
# small_cnn, one channel: 144+32 + 4608+64 + 18432+128 + 650 = 24058
# airbench: whitening 24 filters of 2x2x3 288; 9 * (24*64 + 64*64 + 64*128 + 128*128 + 128*256 + 256*256)
#   = 1156608; norms 2 * 2*(64 + 128 + 256) = 1792, of which half never change; fc without bias 2560 -> 1161248
# resnet18 and resnet50 of ImageNet: the counts that torchvision documents for its weights
COUNTS = {
    ("resnet32a", 10, 3): 464_154,
    ("resnet32", 10, 3): 466_906,
    ("resnet32", 100, 3): 472_756,
    ("resnet110a", 10, 3): 1_727_962,
    ("resnet18", 10, 3): 11_173_962,
    ("vgg16", 10, 3): 15_253_578,
    ("vgg19", 10, 3): 20_565_834,
    ("densenet40_12", 10, 3): 176_122,
    ("densenet100_12", 10, 3): 769_162,
    ("small_cnn", 10, 1): 24_058,
    ("airbench", 10, 3): 1_161_248,
    ("resnet18_imagenet", 1000, 3): 11_689_512,
    ("resnet50", 1000, 3): 25_557_032,
}


def bottleneck_count(blocks: int, widen: int, classes: int) -> int:
    """Parameters of the official bottleneck ResNets, from the layer table rather than from code."""
    total, channels = 3 * 16 * 9 + 32, 16
    for planes in (16, 32, 64):
        width, out = planes * widen, planes * 4
        for block in range(blocks):
            total += channels * width + 2 * width  # 1x1 and its norm
            total += width * width * 9 + 2 * width  # 3x3
            total += width * out + 2 * out  # 1x1
            if block == 0:
                total += channels * out + 2 * out  # projection: the first block changes the width
            channels = out
    return total + channels * classes + classes


@pytest.mark.parametrize(("key", "count"), COUNTS.items(), ids=lambda v: str(v))
def test_parameter_count_matches_the_published_network(key, count):
    model = create_model(*key)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("name", "blocks", "widen"), [("resnet110", 12, 1), ("wrn20_8", 2, 8)])
def test_bottleneck_networks_follow_the_official_layer_table(name, blocks, widen):
    model = create_model(name, 100, 3)
    assert sum(p.numel() for p in model.parameters()) == bottleneck_count(blocks, widen, 100)


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("size", [8, 32])
def test_every_network_gives_logits_at_both_sizes(name, size):
    if size == 32 and name in ("vgg19", "resnet110a", "densenet100_12"):
        pytest.skip("its smaller sibling of the same class covers this size")
    with torch.device("meta"):  # shapes only: no arithmetic, so the large networks cost nothing
        model = create_model(name, 7, 2).eval()
        assert model(torch.empty(3, 2, size, size)).shape == (3, 7)


def torchvision_names(blocks: tuple[int, ...], convolutions: int, first_projects: bool) -> set[str]:
    """State names of torchvision's ResNets, from their naming rule rather than from our modules."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{part}" for part in norm)}
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            here = f"layer{stage}.{block}"
            for number in range(1, convolutions + 1):
                names |= {f"{here}.conv{number}.weight", *(f"{here}.bn{number}.{part}" for part in norm)}
            if block == 0 and (stage > 1 or first_projects):
                names |= {f"{here}.downsample.0.weight", *(f"{here}.downsample.1.{part}" for part in norm)}
    return names


@pytest.mark.parametrize(
    ("name", "blocks", "convolutions", "first_projects"),
    [
        ("resnet18_imagenet", (2, 2, 2, 2), 2, False),
        ("resnet50", (3, 4, 6, 3), 3, True),
        ("resnet18", (2, 2, 2, 2), 2, False),
    ],
)
def test_resnets_have_torchvisions_state_names(name, blocks, convolutions, first_projects):
    with torch.device("meta"):
        model = create_model(name, 1000, 3)
    assert set(model.state_dict()) == torchvision_names(blocks, convolutions, first_projects)
    convs = {n: m.stride[0] for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {n: stride for n, stride in convs.items() if stride != 1} == {
        **({} if name == "resnet18" else {"conv1": 2}),
        **{f"layer{stage}.0.conv{2 if convolutions == 3 else 1}": 2 for stage in (2, 3, 4)},  # v1.5: in the 3x3
        **{f"layer{stage}.0.downsample.0": 2 for stage in (2, 3, 4)},
    }


def test_forward_and_gradient_are_finite():
    model = create_model("small_cnn", 10, 1)
    loss = model(torch.randn(4, 1, 8, 8)).square().sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())


def correlated_images(count: int = 20, channels: int = 3, size: int = 12) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are alike, as in photographs, with a mean that is not zero."""
    noise = torch.randn(count, channels, size + 2, size + 2, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1)
    return 0.3 + 2 * smooth + smooth.mean(1, keepdim=True) + 0.5 * noise[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize("channels", [1, 3])
def test_airbench_whitens_the_patches_of_the_images_it_is_given(channels):
    images = correlated_images(channels=channels)
    model = create_model("airbench", 10, channels)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = model.whiten(images)
    assert not torch.allclose(second_moment(outputs), torch.eye(4 * channels), atol=0.3)  # before
    model.init_from_images(images)
    outputs = model.whiten(images)
    assert outputs.shape == (20, 8 * channels, 11, 11)
    torch.testing.assert_close(second_moment(outputs), torch.eye(4 * channels), atol=0.02, rtol=0)
    torch.testing.assert_close(outputs[:, 4 * channels :], -outputs[:, : 4 * channels])
    assert (model.whiten.weight[0].sum((1, 2)).abs() > model.whiten.weight[4 * channels - 1].sum((1, 2)).abs()).all()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {"whiten.weight"}


def second_moment(outputs: torch.Tensor) -> torch.Tensor:
    """`E[x x^T]` of the first half of the channels over all pixels."""
    rows = outputs.detach().movedim(1, 3).flatten(0, 2)[:, : outputs.shape[1] // 2]
    return rows.T @ rows / len(rows)


def test_airbench_adds_little_to_an_image_without_contrast():
    model = create_model("airbench_small", 10)
    model.init_from_images(torch.full((2, 3, 8, 8), 0.5))  # one eigenvalue is not zero
    assert model.whiten.weight.isfinite().all() and model.whiten.weight.abs().max() <= 5e-4**-0.5


def test_airbench_trains_all_but_the_filters_and_the_scales_of_its_norms():
    torch.manual_seed(0)
    model = create_model("airbench_small", 10)
    images = correlated_images(8, size=16)
    model.init_from_images(images)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images.to(memory_format=torch.channels_last))
    assert logits.shape == (8, 10) and logits.dtype == torch.bfloat16
    torch.nn.functional.cross_entropy(logits.float(), torch.arange(8)).backward()
    optimizer.step()
    kept = {name for name, tensor in model.named_parameters() if torch.equal(tensor, before[name])}
    assert kept == {"whiten.weight", *(n for n in before if n.startswith("features") and before[n].eq(1).all())}
    assert len(kept) == 1 + 6


def test_airbench_convolutions_start_as_the_identity_on_their_inputs():
    model = create_model("airbench", 10)
    images = torch.randn(2, 24, 5, 5)
    torch.testing.assert_close(model.features[0](images)[:, :24], images)


def test_option_a_shortcut_keeps_pixels_and_adds_zero_channels():
    block = create_model("resnet32a", 10, 3).layer2[0]
    x = torch.randn(2, 16, 4, 4)
    out = block.downsample(x)
    assert out.shape == (2, 32, 2, 2)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == 0 and out[:, 24:].abs().sum() == 0


def test_unknown_name_says_what_exists(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # import fails whether or not timm is installed
    with pytest.raises(ValueError, match=r"unknown model 'resnet23'; did you mean 'resnet\d+'.*timm"):
        create_model("resnet23", 10)
    with pytest.raises(ValueError, match=r"timm:resnet18 needs timm, whose import failed: .*; install it"):
        create_model("timm:resnet18", 10)
    with pytest.raises(ValueError, match="at least 1"):
        create_model("small_cnn", 0)


def test_timm_names_are_passed_on(monkeypatch):
    asked = {}

    def build(name, num_classes, in_chans):
        asked.update(name=name, num_classes=num_classes, in_chans=in_chans)
        return torch.nn.Identity()

    fake = types.SimpleNamespace(
        __version__="fake",
        is_model=lambda name: name in ("resnet32", "vit_tiny"),
        list_models=lambda: ["vit_tiny"],
        create_model=build,
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    create_model("timm:resnet32", 5, 1)  # the prefix wins over the built-in network of that name
    assert asked == {"name": "resnet32", "num_classes": 5, "in_chans": 1}
    create_model("vit_tiny", 3)
    assert asked["name"] == "vit_tiny"
    with pytest.raises(ValueError, match="close names: vit_tiny"):
        create_model("vit_tinny", 3)
    assert "resnet32" in MODELS
