"""MobileSAM's encoder: TinyViT-5M (Wu et al., ECCV 2022) from timm, its last stage kept at stride 16, with SAM's neck
behind it (Zhang et al., 2023).
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from timm.models.tiny_vit import TinyVitBlock
from torch import Tensor, nn

EMBED_DIM = 256  # SAM's width behind the neck
ENCODER_STRIDE = 16
#: Px after which the windows of all stages but the third repeat; those of the third do every second time.
WINDOW = 112
Early = tuple[Tensor, Tensor, Tensor]  # (N, 32, H/2, W/2), (N, 64, H/4, W/4), (N, 128, H/8, W/8)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of NCHW, written with `F.layer_norm`.

    SAM's own squares (x - mean) in the working precision and passes fp16's 65,504 (NVIDIA/TensorRT#3692).
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Block(TinyVitBlock):
    """timm's, padded to whole windows without asking whether it must be: one graph for sides of either kind."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same shape."""
        n, height, width, channels = x.shape
        side = self.window_size
        down, across = (height + side - 1) // side, (width + side - 1) // side
        windows = F.pad(x, (0, 0, 0, across * side - width, 0, down * side - height))
        windows = windows.view(n, down, side, across, side, channels).transpose(2, 3)
        windows = self.attn(windows.reshape(-1, side * side, channels))
        windows = windows.view(n, down, across, side, side, channels).transpose(2, 3)
        windows = windows.reshape(n, down * side, across * side, channels)
        x = (x + windows[:, :height, :width]).permute(0, 3, 1, 2)
        x = self.local_conv(x).flatten(2).transpose(1, 2)
        return (x + self.mlp(x)).view(n, height, width, channels)


class Encoder(nn.Module):
    """(N, 3, H, W) float32, normalised -> (N, 256, H/16, W/16) and the early features that `Detail` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.create_model("tiny_vit_5m_224", pretrained=False, num_classes=1000, drop_path_rate=0.0)
        self.vit.stages[3].downsample.conv2.conv.stride = (1, 1)
        for block in self.vit.stages[2].blocks:
            block.__class__ = Block  # the weights stay as timm drew them: a seed gives the network that it gave before
        self.neck = nn.Sequential(
            nn.Conv2d(320, EMBED_DIM, 1, bias=False),
            LayerNorm2d(EMBED_DIM),
            nn.Conv2d(EMBED_DIM, EMBED_DIM, 3, padding=1, bias=False),
            LayerNorm2d(EMBED_DIM),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Early]:
        patch = self.vit.patch_embed
        stride_2 = patch.act(patch.conv1(x))
        stride_4 = self.vit.stages[0](patch.conv2(stride_2))
        stride_8 = self.vit.stages[1](stride_4)
        return self.neck(self.vit.stages[3](self.vit.stages[2](stride_8))), (stride_2, stride_4, stride_8)
