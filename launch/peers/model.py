"""Stable Diffusion 3.5 in PyTorch: transformer and decoder with random weights, from torch's own operations and SDPA.

Nothing but torch is needed. tests/peers/check_diffusion_nft.py compares both with what diffusers computes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Size:
    """Stable Diffusion 3.5 Medium, 512 x 512."""

    width: int = 1536
    heads: int = 24
    depth: int = 24
    second: int = 13  # blocks with a second attention, the first ones
    latent: int = 64  # side of a latent
    context: int = 4096
    pooled: int = 2048
    channels: tuple = (512, 512, 256, 128)  # of the decoder
    layers: int = 3  # of each of its blocks
    groups: int = 32


MEDIUM = Size()
TINY = Size(64, 2, 3, 1, 8, 64, 64, (32, 32, 16, 16), 2, 4)


class Linear(nn.Linear):
    """With a LoRA adapter of rank 32 for each name in `adapters`; the one in `Linear.active` is added."""

    active = "policy"

    def __init__(self, fan_in, fan_out, adapters=()):
        super().__init__(fan_in, fan_out)
        self.adapters = nn.ModuleDict()
        for name in adapters:
            self.adapters[name] = nn.ParameterList([torch.randn(32, fan_in) / 32, torch.zeros(fan_out, 32)])

    def forward(self, x):
        y = super().forward(x)
        if Linear.active in self.adapters:
            down, up = self.adapters[Linear.active]
            y = y + 2.0 * F.linear(F.linear(x, down), up)
        return y


class Projections(nn.Module):
    def __init__(self, size, adapters):
        super().__init__()
        self.heads = size.heads
        self.q, self.k, self.v = (Linear(size.width, size.width, adapters) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(size.width // size.heads, eps=1e-6) for _ in range(2))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.norm_q(q), self.norm_k(k), v


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mlp(fan_in, hidden, fan_out, activation):
    return nn.Sequential(Linear(fan_in, hidden), activation, Linear(hidden, fan_out))


def modulate(x, shift, scale):
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, size, second, last, adapters):
        super().__init__()
        width = size.width
        self.last = last
        self.image_modulation = Linear(width, (9 if second else 6) * width)
        self.text_modulation = Linear(width, (2 if last else 6) * width)
        self.image, self.text = Projections(size, adapters), Projections(size, adapters)
        self.image_out = Linear(width, width, adapters)
        self.text_out = None if last else Linear(width, width, adapters)
        self.second = Projections(size, ()) if second else None
        self.second_out = Linear(width, width) if second else None
        self.image_mlp = mlp(width, 4 * width, width, nn.GELU("tanh"))
        self.text_mlp = None if last else mlp(width, 4 * width, width, nn.GELU("tanh"))

    def forward(self, image, text, vector):
        activated = F.silu(vector)
        m = self.image_modulation(activated).chunk(9 if self.second else 6, -1)
        c = self.text_modulation(activated).chunk(2 if self.last else 6, -1)
        a = self.image(modulate(image, m[0], m[1]))
        b = self.text(modulate(text, c[1], c[0]) if self.last else modulate(text, c[0], c[1]))
        out = attention(*(torch.cat(pair, 2) for pair in zip(a, b)))
        tokens = image.shape[1]
        h = image + m[2][:, None] * self.image_out(out[:, :tokens])
        if self.second:
            h = h + m[8][:, None] * self.second_out(attention(*self.second(modulate(image, m[6], m[7]))))
        image = h + m[5][:, None] * self.image_mlp(modulate(h, m[3], m[4]))
        if not self.last:
            h = text + c[2][:, None] * self.text_out(out[:, tokens:])
            text = h + c[5][:, None] * self.text_mlp(modulate(h, c[3], c[4]))
        return image, text


class Transformer(nn.Module):
    def __init__(self, size, adapters=()):
        super().__init__()
        width = size.width
        self.patch = nn.Conv2d(16, width, 2, 2)
        self.register_buffer("positions", torch.randn(1, size.latent * size.latent // 4, width))
        self.time, self.pooled = mlp(256, width, width, nn.SiLU()), mlp(size.pooled, width, width, nn.SiLU())
        self.context = Linear(size.context, width)
        self.blocks = nn.ModuleList(
            Block(size, i < size.second, i + 1 == size.depth, adapters) for i in range(size.depth)
        )
        self.modulation, self.out = Linear(width, 2 * width), Linear(width, 64)

    def forward(self, x, t, text, pooled, again=False):
        """Velocity [B, 16, H, W] of the latents x at the times t in [0, 1]; `again`: blocks run again going back."""
        frequencies = torch.exp(-torch.arange(128, device=x.device) * (9.210340371976184 / 128))
        angles = 1000 * t[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
        image = self.patch(x).flatten(2).transpose(1, 2)
        image = (image + self.positions).to(image.dtype)
        vector = self.time(features) + self.pooled(pooled)
        text = self.context(text)
        for block in self.blocks:
            if again:
                image, text = checkpoint(block, image, text, vector, use_reentrant=False)
            else:
                image, text = block(image, text, vector)
        scale, shift = self.modulation(F.silu(vector)).chunk(2, -1)
        patches = self.out(modulate(image, shift, scale)).unflatten(1, (x.shape[2] // 2, -1)).unflatten(-1, (2, 2, 16))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def norm(size, channels):
    return nn.GroupNorm(size.groups, channels, eps=1e-6)


class Resnet(nn.Module):
    def __init__(self, size, fan_in, fan_out):
        super().__init__()
        self.first = nn.Sequential(norm(size, fan_in), nn.SiLU(), nn.Conv2d(fan_in, fan_out, 3, padding=1))
        self.then = nn.Sequential(norm(size, fan_out), nn.SiLU(), nn.Conv2d(fan_out, fan_out, 3, padding=1))
        self.beside = nn.Identity() if fan_in == fan_out else nn.Conv2d(fan_in, fan_out, 1)

    def forward(self, x):
        return self.beside(x) + self.then(self.first(x))


class Attention(nn.Module):
    """Of one head, among the pixels of a latent."""

    def __init__(self, size, channels):
        super().__init__()
        self.norm = norm(size, channels)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)[:, None]
        y = self.out(F.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens)))
        return x + y[:, 0].transpose(1, 2).reshape(x.shape)


class Decoder(nn.Sequential):
    """Latents [B, 16, H, W] to pictures [B, 3, 8 H, 8 W] in about [-1, 1]."""

    def __init__(self, size):
        first, last = size.channels[0], size.channels[-1]
        parts = [nn.Conv2d(16, first, 3, padding=1)]
        parts += [Resnet(size, first, first), Attention(size, first), Resnet(size, first, first)]
        fan_in = first
        for i, channels in enumerate(size.channels):
            for _ in range(size.layers):
                parts.append(Resnet(size, fan_in, channels))
                fan_in = channels
            if i + 1 < len(size.channels):
                parts += [nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1)]
        parts += [norm(size, last), nn.SiLU(), nn.Conv2d(last, 3, 3, padding=1)]
        super().__init__(*parts)
