"""ResNet-18 and ResNet-50 for 224-pixel images, with torchvision's state names.

`resnet50` is "v1.5": the stride of a down-sampling bottleneck is in its 3x3 convolution (Goyal et al. 2017 and every
later recipe). A state dict of torchvision's `resnet18` or `resnet50` loads into these and gives the same logits.
Initialisation is torchvision's: He normal over the fan-out for convolutions, ones and zeros for norms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ImageNetResNet"]


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class _Basic(nn.Module):
    expansion = 1

    def __init__(self, channels: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(channels, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(channels, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


_Block = type[_Basic] | type[_Bottleneck]
_DEPTHS: dict[int, tuple[_Block, tuple[int, ...]]] = {18: (_Basic, (2, 2, 2, 2)), 50: (_Bottleneck, (3, 4, 6, 3))}


class ImageNetResNet(nn.Module):
    """Residual network with the 7x7 stride-2 stem and max-pooling of He et al. 2016.

    Args:
        num_classes: logits.
        in_channels: channels of the images `(B, in_channels, h, w)`, h and w at least 1 (meant for 160 to 288).
        depth: 18 (basic blocks) or 50 (bottlenecks).

    Source:
        He et al., CVPR 2016; names as in pytorch/vision `torchvision/models/resnet.py`.

    Example:
        >>> ImageNetResNet(1000, 3, depth=18).layer4[1].conv2.weight.shape
        torch.Size([512, 512, 3, 3])
    """

    def __init__(self, num_classes: int, in_channels: int, *, depth: int) -> None:
        super().__init__()
        block, counts = _DEPTHS[depth]
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(block, counts)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stages(block: _Block, counts: Sequence[int]) -> list[nn.Sequential]:
    stages, channels = [], 64
    for index, count in enumerate(counts):
        planes, layers = 64 * 2**index, []
        for number in range(count):
            stride, out_channels = (2 if index > 0 and number == 0 else 1), planes * block.expansion
            downsample = None
            if stride != 1 or channels != out_channels:
                downsample = nn.Sequential(_conv(channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
            layers.append(block(channels, planes, stride, downsample))
            channels = out_channels
        stages.append(nn.Sequential(*layers))
    return stages
