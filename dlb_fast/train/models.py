"""Networks: those of the DLB code for 32x32 images, small ones for digits and for CPUs, and two ResNets for ImageNet.

The architectures follow the official repository (Meta-knowledge-Lab/DLB@8949a46, `models/`) layer by layer, because its
names do not always mean what the literature means by them:

===================  ====================================================================
``resnet32``         basic blocks (5, 5, 5), 16-32-64 channels, **projection** shortcuts (option B)
``resnet110``        **bottleneck** blocks (12, 12, 12), as in the official code
``resnet32a``        He et al. 2016: basic blocks, parameter-free shortcuts (option A)
``resnet110a``       He et al. 2016: basic blocks (18, 18, 18), option A
``resnet18``         the ImageNet ResNet-18 with a 3x3 stride-1 stem and no max-pool
``wrn20_8``          bottleneck blocks (2, 2, 2), inner width 8 times as wide, as in the official code
``vgg16``            VGG with BatchNorm and the official three-layer classifier 512-512-C; also ``vgg19``
``densenet40_12``    DenseNet-BC, L=40, k=12, compression 0.5; ``densenet100_12`` likewise
``small_cnn``        three 3x3 convolutions; trains in seconds on 8x8 digits
``airbench``         whitening and six 3x3 convolutions (64-128-256), for bfloat16 on a CPU with AMX
``airbench_small``   the same with 32-64-128 channels, about half the time
``resnet50``         ImageNet: 7x7 stem and max-pool; also ``resnet18_imagenet``
===================  ====================================================================

Every network takes any input of at least 8x8 pixels and any number of channels. Any other name is looked up in timm,
if it is installed; ``timm:NAME`` always is.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "ResNet", "architecture", "create_model", "import_timm", "list_models"]


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class _OptionA(nn.Module):
    """Parameter-free shortcut of He et al.: every second pixel, missing channels are zero."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, downsample: nn.Module | None, widen: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, downsample: nn.Module | None, widen: int) -> None:
        super().__init__()
        width = planes * widen
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """Residual network with torchvision's state names: a state dict of its `resnet18` or `resnet50` loads into ours.

    The stride of a down-sampling bottleneck is in its 3x3 convolution ("v1.5", Goyal et al. 2017). Convolutions are
    initialised by He normal over the fan-out, as in torchvision.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        block: basic or bottleneck.
        blocks: number of blocks per stage; the first stage keeps the size, every later one halves it.
        width: channels of the stem; doubled by every stage.
        stem: "cifar", a 3x3 convolution; or "imagenet", a 7x7 convolution and a max-pool, each with stride 2.
        shortcut: "projection" (1x1 convolution, option B of He et al.) or "pad" (parameter-free, option A).
        widen: factor on the inner width of bottlenecks.

    Source:
        He et al., CVPR 2016; names as in pytorch/vision `torchvision/models/resnet.py`.

    Example:
        >>> create_model("resnet18_imagenet", 1000).layer4[1].conv2.weight.shape
        torch.Size([512, 512, 3, 3])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        block: type[_BasicBlock | _Bottleneck],
        blocks: Sequence[int],
        width: int = 16,
        stem: Literal["cifar", "imagenet"] = "cifar",
        shortcut: Literal["projection", "pad"] = "projection",
        widen: int = 1,
    ) -> None:
        super().__init__()
        self.imagenet_stem = stem == "imagenet"
        if self.imagenet_stem:
            self.conv1 = _conv(in_channels, width, 7, stride=2)
        else:
            self.conv1 = _conv(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for index, count in enumerate(blocks):
            planes = width * 2**index
            out_channels = planes * block.expansion
            layers: list[nn.Module] = []
            for number in range(count):
                stride = 2 if index > 0 and number == 0 else 1
                downsample: nn.Module | None = None
                if stride != 1 or channels != out_channels:
                    if shortcut == "pad":
                        downsample = _OptionA(channels, out_channels)
                    else:
                        projection = _conv(channels, out_channels, 1, stride)
                        downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
                layers.append(block(channels, planes, stride, downsample, widen))
                channels = out_channels
            self.add_module(self.stages[index], nn.Sequential(*layers))
        self.fc = nn.Linear(channels, num_classes)
        _init_conv_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.imagenet_stem:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG with BatchNorm; the five poolings turn 32x32 into 1x1 (smaller inputs are averaged)."""

    def __init__(self, num_classes: int, in_channels: int, *, depth: int) -> None:
        super().__init__()
        repeat = {16: 3, 19: 4}[depth]
        layers: list[nn.Module] = []
        channels = in_channels
        for planes, count in ((64, 2), (128, 2), (256, repeat), (512, repeat), (512, repeat)):
            for _ in range(count):
                layers += [nn.Conv2d(channels, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU()]
                channels = planes
            # with ceil_mode 8x8 inputs survive five poolings; at 32x32 it changes nothing
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, num_classes)
        )
        _init_conv_fan_out(self)
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class _DenseLayer(nn.Module):
    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, 4 * growth, 1)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat((x, new), dim=1)


class DenseNet(nn.Module):
    """DenseNet-BC for small images: three blocks of (depth - 4) / 6 layers, compression 0.5."""

    def __init__(self, num_classes: int, in_channels: int, *, depth: int, growth: int) -> None:
        super().__init__()
        channels = 2 * growth
        layers: list[nn.Module] = [_conv(in_channels, channels, 3)]
        for block in range(3):
            for _ in range((depth - 4) // 6):
                layers.append(_DenseLayer(channels, growth))
                channels += growth
            if block < 2:
                layers += [nn.BatchNorm2d(channels), nn.ReLU(), _conv(channels, channels // 2, 1)]
                layers.append(nn.AvgPool2d(2))
                channels //= 2
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm (16, 32, 64 channels), one pooling, one linear layer."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for planes in (16, 32, 64):
            layers += [_conv(channels, planes, 3), nn.BatchNorm2d(planes), nn.ReLU()]
            if planes == 16:
                layers.append(nn.MaxPool2d(2))
            channels = planes
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        _init_conv_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class AirBench(nn.Module):
    """Few wide convolutions behind one that whitens 2x2 patches: accurate after a few epochs on 32x32 images.

    `gelu(whiten(x))`, then three groups `conv 3x3 - max-pool - norm - gelu - conv 3x3 - norm - gelu`, the maximum over
    what is left of the plane, and a linear layer without bias, times 1/9. The norms have a bias and no scale, and the
    convolutions start as the identity on as many channels as they have inputs. Against the source: narrower, no bias of
    the whitening (so nothing before the first 3x3 convolution needs a gradient), poolings that round up (32 - 31 - 16 -
    8 - 4), and torch's momentum and eps of the norms.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        widths: channels of the three groups; the matrix units of a CPU (AMX) take 32 at a time.

    Source:
        Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"; KellerJordan/cifar10-airbench `airbench94.py`.

    Example:
        >>> create_model("airbench", 10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int, in_channels: int, *, widths: Sequence[int]) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(in_channels, 8 * in_channels, 2, bias=False)
        self.whiten.weight.requires_grad_(False)
        channels = 8 * in_channels
        layers: list[nn.Module] = []
        for width in widths:
            layers += [_conv(channels, width, 3), nn.MaxPool2d(2, ceil_mode=True), _norm_without_scale(width)]
            layers += [nn.GELU(), _conv(width, width, 3), _norm_without_scale(width), nn.GELU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes, bias=False)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.dirac_(layer.weight[: layer.in_channels])

    @torch.no_grad()
    def init_from_images(self, images: Tensor) -> None:
        """Set the whitening filters from normalised images `(n, channels, h, w)`, a training set's; they stay fixed.

        With the eigenvectors `v_k` and eigenvalues `l_k` of the covariance (about zero) of all 2x2 patches, filter k is
        `v_k / sqrt(l_k + 5e-4)` and filter `4 * channels + k` its negative, so that the outputs are uncorrelated.
        """
        size = 4 * images.shape[1]
        total, count = torch.zeros(size, size, dtype=torch.float64, device=images.device), 0
        for part in images.split(32):  # the patches of all images would take much memory
            patches = F.unfold(part, 2).transpose(1, 2).flatten(0, 1).double()
            total, count = total + patches.T @ patches, count + len(patches)
        values, vectors = torch.linalg.eigh(total / count)
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).view(-1, images.shape[1], 2, 2)
        self.whiten.weight.copy_(torch.cat((filters, -filters)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(F.gelu(self.whiten(x)))
        return self.fc(x.amax((2, 3))) / 9


def _norm_without_scale(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.weight.requires_grad_(False)
    return norm


def _init_conv_fan_out(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": lambda n, c: ResNet(n, c, block=_BasicBlock, blocks=(2, 2, 2, 2), width=64),
    "resnet32": lambda n, c: ResNet(n, c, block=_BasicBlock, blocks=(5, 5, 5)),
    "resnet32a": lambda n, c: ResNet(n, c, block=_BasicBlock, blocks=(5, 5, 5), shortcut="pad"),
    "resnet110": lambda n, c: ResNet(n, c, block=_Bottleneck, blocks=(12, 12, 12)),
    "resnet110a": lambda n, c: ResNet(n, c, block=_BasicBlock, blocks=(18, 18, 18), shortcut="pad"),
    "wrn20_8": lambda n, c: ResNet(n, c, block=_Bottleneck, blocks=(2, 2, 2), widen=8),
    "vgg16": lambda n, c: VGG(n, c, depth=16),
    "vgg19": lambda n, c: VGG(n, c, depth=19),
    "densenet40_12": lambda n, c: DenseNet(n, c, depth=40, growth=12),
    "densenet100_12": lambda n, c: DenseNet(n, c, depth=100, growth=12),
    "small_cnn": lambda n, c: SmallCNN(n, c),
    "airbench": lambda n, c: AirBench(n, c, widths=(64, 128, 256)),
    "airbench_small": lambda n, c: AirBench(n, c, widths=(32, 64, 128)),
    "resnet18_imagenet": lambda n, c: ResNet(n, c, block=_BasicBlock, blocks=(2, 2, 2, 2), width=64, stem="imagenet"),
    "resnet50": lambda n, c: ResNet(n, c, block=_Bottleneck, blocks=(3, 4, 6, 3), width=64, stem="imagenet"),
}


def list_models() -> list[str]:
    """Names of the built-in networks, sorted (timm's names work too when timm is installed)."""
    return sorted(MODELS)


def architecture(name: str) -> str:
    """The name of a network without the tag of timm's weights.

    Example:
        >>> architecture("timm:resnet50.a1_in1k"), architecture("resnet50")
        ('timm:resnet50', 'resnet50')
    """
    stem, dot, _ = name.removeprefix("timm:").partition(".")
    return f"timm:{stem}" if dot else name


def create_model(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a network that maps images `(B, in_channels, h, w)` to logits `(B, num_classes)`, at random weights.

    Args:
        name: one of `list_models()`, `timm:NAME`, or a plain timm name when timm is installed.
        num_classes: number of logits, at least 1.
        in_channels: channels of the images.
    Raises:
        ValueError: unknown name, a timm name while timm cannot be imported (saying why), or a name with the tag of
            weights, which would not be loaded.
    Example:
        >>> create_model("small_cnn", num_classes=10, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if num_classes < 1 or in_channels < 1:
        raise ValueError(
            f"create_model: num_classes and in_channels must be at least 1, got {num_classes} and {in_channels}"
        )
    if name in MODELS:
        return MODELS[name](num_classes, in_channels)
    timm = import_timm(name)
    if architecture(name) != name:
        raise ValueError(
            f"create_model: {name!r} names weights of timm, which are loaded with --pretrained only; add it, or leave "
            f"the tag out to start at random: {architecture(name)}"
        )
    return timm.create_model(name.removeprefix("timm:"), num_classes=num_classes, in_chans=in_channels)


def import_timm(name: str) -> Any:
    """timm, which knows the network `name`.

    Raises:
        ValueError: timm cannot be imported, or does not know the name.
    """
    try:
        import timm  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except Exception as error:  # a broken torchvision raises RuntimeError inside timm's import
        if name.startswith("timm:"):
            raise ValueError(
                f"create_model: {name} needs timm, whose import failed: {type(error).__name__}: {error}; install it "
                f"with pip install 'dlb_fast[timm]', or take a built-in network: {', '.join(list_models())}"
            ) from error
        near = difflib.get_close_matches(name, MODELS, n=1)
        raise ValueError(
            f"create_model: unknown model {name!r}{f'; did you mean {near[0]!r}?' if near else ''} "
            f"Built in: {', '.join(list_models())}. timm names need timm, whose import failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    timm_name = name.removeprefix("timm:")
    if not timm.is_model(timm_name):
        near = difflib.get_close_matches(timm_name, [*MODELS, *timm.list_models()], n=3)
        raise ValueError(
            f"create_model: neither dlb_fast nor timm {timm.__version__} knows a model {name!r}; "
            f"close names: {', '.join(near) or 'none'}. Built in: {', '.join(list_models())}"
        )
    return timm
