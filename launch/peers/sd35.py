#!/usr/bin/env python3
"""The work of benches/gpu.rs in PyTorch: the transformer of Stable Diffusion 3.5 Medium with random weights, bf16, SDPA.

Written from torch's own operations, so that nothing but torch is needed. Prints one line of JSON, in the form of the
bench's last line. Latents of 64 x 64, 205 text tokens; batch 16 in the rollout, 8 in training.
"""

import json
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, DEPTH, SECOND = 1536, 24, 24, 13
LATENT, TEXT, ROLLOUT, TRAINING, STEPS, REPETITIONS = 64, 205, 16, 8, 10, 5


class Linear(nn.Linear):
    """With a LoRA adapter of rank 32 where `adapted`."""

    def __init__(self, fan_in, fan_out, adapted=False):
        super().__init__(fan_in, fan_out)
        self.adapter = nn.ParameterList([nn.Parameter(torch.randn(32, fan_in) / 32), nn.Parameter(torch.zeros(fan_out, 32))]) if adapted else None

    def forward(self, x):
        y = super().forward(x)
        if self.adapter is not None:
            y = y + 2.0 * F.linear(F.linear(x, self.adapter[0]), self.adapter[1])
        return y


class Projections(nn.Module):
    def __init__(self, adapted):
        super().__init__()
        self.q, self.k, self.v = (Linear(WIDTH, WIDTH, adapted) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(WIDTH // HEADS, eps=1e-6) for _ in range(2))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.norm_q(q), self.norm_k(k), v


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mlp(fan_in, hidden, fan_out, activation):
    return nn.Sequential(Linear(fan_in, hidden), activation, Linear(hidden, fan_out))


def modulate(x, shift, scale):
    return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, second, last, lora):
        super().__init__()
        self.last = last
        self.image_modulation = Linear(WIDTH, (9 if second else 6) * WIDTH)
        self.text_modulation = Linear(WIDTH, (2 if last else 6) * WIDTH)
        self.image, self.text = Projections(lora), Projections(lora)
        self.image_out = Linear(WIDTH, WIDTH, lora)
        self.text_out = None if last else Linear(WIDTH, WIDTH, lora)
        self.second = Projections(False) if second else None
        self.second_out = Linear(WIDTH, WIDTH) if second else None
        self.image_mlp = mlp(WIDTH, 4 * WIDTH, WIDTH, nn.GELU("tanh"))
        self.text_mlp = None if last else mlp(WIDTH, 4 * WIDTH, WIDTH, nn.GELU("tanh"))

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
    def __init__(self, lora):
        super().__init__()
        self.patch = nn.Conv2d(16, WIDTH, 2, 2)
        self.register_buffer("positions", torch.randn(1, LATENT * LATENT // 4, WIDTH))
        self.time, self.pooled = mlp(256, WIDTH, WIDTH, nn.SiLU()), mlp(2048, WIDTH, WIDTH, nn.SiLU())
        self.context = Linear(4096, WIDTH)
        self.blocks = nn.ModuleList(Block(i < SECOND, i + 1 == DEPTH, lora) for i in range(DEPTH))
        self.modulation, self.out = Linear(WIDTH, 2 * WIDTH), Linear(WIDTH, 64)

    def forward(self, x, t, text, pooled, again=False):
        frequencies = torch.exp(-torch.arange(128, device=x.device) * (9.210340371976184 / 128))
        angles = 1000 * t[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
        image = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        vector = self.time(features) + self.pooled(pooled)
        text = self.context(text)
        for block in self.blocks:
            image, text = checkpoint(block, image, text, vector, use_reentrant=False) if again else block(image, text, vector)
        scale, shift = self.modulation(F.silu(vector)).chunk(2, -1)
        return self.out(modulate(image, shift, scale))


def measure(rows, phase, count, work):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for repetition in range(REPETITIONS + 2):  # two for warmth
        torch.cuda.synchronize()
        since = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if repetition > 1:
            seconds.append(time.perf_counter() - since)
    median = sorted(seconds)[REPETITIONS // 2]
    rows.append({"phase": phase, "ms": 1e3 * median, "rate": count / median, "gb": torch.cuda.max_memory_reserved() / 1e9})


def inputs(batch):
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    return make(batch, 16, LATENT, LATENT), torch.full((batch,), 0.5, device="cuda"), make(batch, TEXT, 4096), make(batch, 2048)


def main():
    rows = []
    for kind in ("LoRA", "full"):
        model = Transformer(kind == "LoRA").to("cuda", torch.bfloat16)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kind == "full" or ".adapter." in name)
        rollout, training = inputs(ROLLOUT), inputs(TRAINING)

        def sample():
            with torch.no_grad():
                for _ in range(STEPS):
                    model(*rollout)

        def train(again):
            model(*training, again=again).float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        measure(rows, f"{kind}: rollout, {STEPS} steps, batch {ROLLOUT}", ROLLOUT, sample)
        measure(rows, f"{kind}: forward, backward, batch {TRAINING}, each block again", TRAINING, lambda: train(True))
        measure(rows, f"{kind}: forward, backward, batch {TRAINING}, keeping activations", TRAINING, lambda: train(False))
        del model
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
