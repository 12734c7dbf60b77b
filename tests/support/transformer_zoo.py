"""Denoisers with attention, as unfolding networks have them; importing this adds them to ``ZOO``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from dun_zoo import Case, ListOfDenoisers, entry
from torch import Tensor, nn

DIM, HEADS, WINDOW = 8, 2, 4


class ChannelNorm(nn.Module):
    """A layer norm over the channels of images, with a weight alone."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt() * self.weight[:, None, None]


class GatedFeedForward(nn.Module):
    """1x1 and depthwise convolutions, half of which gate the other half."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.project_in = nn.Conv2d(dim, 4 * dim, 1)
        self.depthwise = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)
        self.project_out = nn.Conv2d(2 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.depthwise(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class SpectralAttention(nn.Module):
    """Attention among channels: separate linear layers without bias, a scale a head, a convolved position (MST)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.rescale = nn.Parameter(torch.rand(HEADS, 1, 1))
        self.proj = nn.Linear(DIM, DIM)
        self.pos_emb = nn.Sequential(nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM, bias=False), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.flatten(2).mT
        q, k, v = (layer(tokens).mT.reshape(b, HEADS, c // HEADS, h * w) for layer in (self.to_q, self.to_k, self.to_v))
        weights = (F.normalize(k, dim=-1) @ F.normalize(q, dim=-1).mT * self.rescale).softmax(-1)
        mixed = self.proj((weights @ v).reshape(b, c, h * w).mT).mT.reshape(b, c, h, w)
        return mixed + self.pos_emb(self.to_v(tokens).mT.reshape(b, c, h, w))


class TransposedAttention(nn.Module):
    """Attention among channels with fused 1x1 and depthwise convolutions, and a temperature a head (Restormer)."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.qkv = nn.Conv2d(DIM, 3 * DIM, 1, bias=False)
        self.depthwise = nn.Conv2d(3 * DIM, 3 * DIM, 3, padding=1, groups=3 * DIM, bias=False)
        self.project_out = nn.Conv2d(DIM, DIM, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.depthwise(self.qkv(x)).reshape(b, 3, HEADS, c // HEADS, h * w).unbind(1)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature).softmax(-1)
        return self.project_out((weights @ v).reshape(b, c, h, w))


class WindowAttention(nn.Module):
    """Attention within windows: a fused linear layer, and a table of relative positions with its index (Swin)."""

    index: Tensor

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, HEADS) * 0.1)
        y, x = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
        places = torch.stack([y.flatten(), x.flatten()])
        apart = places[:, :, None] - places[:, None] + WINDOW - 1
        self.register_buffer("index", apart[0] * (2 * WINDOW - 1) + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rolled = x.roll((-self.shift, -self.shift), (2, 3))
        windows = rolled.reshape(b, c, h // WINDOW, WINDOW, w // WINDOW, WINDOW).permute(0, 2, 4, 3, 5, 1)
        tokens = self.norm(windows.reshape(-1, WINDOW**2, c))
        q, k, v = self.qkv(tokens).reshape(-1, WINDOW**2, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        mixed = (q @ k.mT * (c // HEADS) ** -0.5 + bias).softmax(-1) @ v
        mixed = self.proj(mixed.transpose(1, 2).reshape(-1, WINDOW**2, c))
        mixed = mixed.reshape(b, h // WINDOW, w // WINDOW, WINDOW, WINDOW, c).permute(0, 5, 1, 3, 2, 4)
        return mixed.reshape(b, c, h, w).roll((self.shift, self.shift), (2, 3))


class ChannelAttention(nn.Module):
    """A weight for each channel, from the means of all (squeeze and excitation)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(DIM, DIM, 3, padding=1), nn.ReLU(), nn.Conv2d(DIM, DIM, 3, padding=1))
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(DIM, DIM // 2, 1), nn.ReLU(), nn.Conv2d(DIM // 2, DIM, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return features * self.squeeze(features)


class Transformer(nn.Module):
    """Blocks of attention and a feed-forward part, between two convolutions."""

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(1, DIM, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList([ChannelNorm(), attention, ChannelNorm(), GatedFeedForward()]) for attention in attentions
        )
        self.mapping = nn.Conv2d(DIM, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.embedding(x)
        for first, attention, second, feed_forward in self.blocks:
            features = features + attention(first(features))
            features = features + feed_forward(second(features))
        return x + 0.1 * self.mapping(features)


class UShaped(nn.Module):
    """A transformer at two scales, with a strided and a transposed convolution and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(1, DIM, 3, padding=1)
        self.encoder, self.bottleneck, self.decoder = SpectralAttention(), SpectralAttention(), SpectralAttention()
        self.down = nn.Conv2d(DIM, DIM, 4, 2, 1, bias=False)
        self.up = nn.ConvTranspose2d(DIM, DIM, 2, 2)
        self.fusion = nn.Conv2d(2 * DIM, DIM, 1, bias=False)
        self.mapping = nn.Conv2d(DIM, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.embedding(x)
        features = features + self.encoder(features)
        deep = self.down(features)
        deep = self.up(deep + self.bottleneck(deep))
        deep = self.fusion(torch.cat([deep, features], dim=1))
        return x + 0.1 * self.mapping(deep + self.decoder(deep))


def _stages(make: Callable[[], nn.Module]) -> Case:
    return Case(ListOfDenoisers([make() for _ in range(3)]), [[f"denoisers.{k}" for k in range(3)]])


@entry
def spectral_attention() -> Case:
    return _stages(lambda: Transformer(SpectralAttention()))


@entry
def transposed_attention() -> Case:
    return _stages(lambda: Transformer(TransposedAttention()))


@entry
def window_attention() -> Case:
    return _stages(lambda: Transformer(WindowAttention(), WindowAttention(shift=WINDOW // 2)))


@entry
def channel_attention() -> Case:
    return _stages(lambda: Transformer(ChannelAttention()))


@entry
def u_shaped_attention() -> Case:
    return _stages(UShaped)
