#!/usr/bin/env python3
"""The work of benches/gpu.rs in PyTorch: the transformer of Stable Diffusion 3.5 Medium, random weights, bf16, SDPA.

Prints one line of JSON, in the form of the bench's last line. Latents of 64 x 64, 205 text tokens; batch 16 in the
rollout, 8 in training.
"""

import json
import time

import torch
from model import MEDIUM, Transformer

TEXT, ROLLOUT, TRAINING, STEPS, REPETITIONS = 205, 16, 8, 10, 5


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
    gigabytes = torch.cuda.max_memory_reserved() / 1e9
    rows.append({"phase": phase, "ms": 1e3 * median, "rate": count / median, "gb": gigabytes})


def normals(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def inputs(batch):
    times = torch.full((batch,), 0.5, device="cuda")
    latents, text = normals(batch, 16, MEDIUM.latent, MEDIUM.latent), normals(batch, TEXT, MEDIUM.context)
    return latents, times, text, normals(batch, MEDIUM.pooled)


def main():
    rows = []
    for kind in ("LoRA", "full"):
        with torch.device("cuda"):
            model = Transformer(MEDIUM, ("policy",) if kind == "LoRA" else ()).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kind == "full" or ".adapters." in name)
        rollout, training = inputs(ROLLOUT), inputs(TRAINING)

        def sample():
            with torch.no_grad():
                for _ in range(STEPS):
                    model(*rollout)

        def train(again):
            model(*training, again=again).float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        measure(rows, f"{kind}: rollout, {STEPS} steps, batch {ROLLOUT}", ROLLOUT, sample)
        name = f"{kind}: forward, backward, batch {TRAINING}"
        measure(rows, f"{name}, each block again", TRAINING, lambda: train(True))
        measure(rows, f"{name}, keeping activations", TRAINING, lambda: train(False))
        del model
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
