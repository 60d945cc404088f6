"""The work of `cargo bench --bench transformer` by diffusers and PEFT, as DiffusionNFT's program does it.

    OMP_NUM_THREADS=1 python tests/peers/bench_transformer.py [lora | full]     (packages: tests/peers/requirements.txt)

Prints medians of 3 and the peak of resident memory.
"""

import copy
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model

BATCH, SIDE, TEXT, STEPS, REPETITIONS = 8, 32, 32, 10, 3
TARGETS = [
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
]


def measure(name, work):
    seconds = []
    for repetition in range(REPETITIONS + 1):
        since = time.perf_counter()
        work()
        if repetition > 0:
            seconds.append(time.perf_counter() - since)
    median = statistics.median(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name:>40}  {median:6.2f} s [{min(seconds):.2f} - {max(seconds):.2f}]  {BATCH / median:6.2f} a second  "
        f"{peak:6.0f} MiB peak so far",
        flush=True,
    )


def main():
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    print(f"{threads} threads, batch {BATCH}, torch {torch.__version__}")
    folder = Path(__file__).resolve().parent.parent / "fixtures/sd3_tiny"
    config = SD3Transformer2DModel.load_config(folder)
    x0, eps = torch.randn(2, BATCH, config["in_channels"], SIDE, SIDE)
    text = torch.randn(BATCH, TEXT, config["joint_attention_dim"])
    pooled = torch.randn(BATCH, config["pooled_projection_dim"])
    t = torch.full((BATCH,), 0.5)
    x_t = 0.5 * x0 + 0.5 * eps
    weight = 0.75  # r of DiffusionNFT

    def velocity(model, x):
        return model(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False
        )[0]

    for trainable in [name for name in ("Lora", "Full") if name.lower() in (sys.argv[1:] or ["lora", "full"])]:
        model = SD3Transformer2DModel.from_config(config)
        if trainable == "Lora":
            lora = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=TARGETS)
            model = get_peft_model(model, lora)
            model.add_adapter("old", lora)
            model.set_adapter("default")
        else:
            frozen = copy.deepcopy(model).requires_grad_(False)
            reference = frozen  # the first iteration's
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)

        @torch.no_grad()
        def old(x):
            if trainable == "Full":
                return velocity(frozen, x)
            model.set_adapter("old")
            v = velocity(model, x)
            model.set_adapter("default")
            return v

        @torch.no_grad()
        def base(x):
            if trainable == "Full":
                return velocity(reference, x)
            with model.disable_adapter():
                return velocity(model, x)

        @torch.no_grad()
        def sample():
            x = x_t
            for _ in range(STEPS):
                x = x - old(x) / STEPS

        def update(kl):
            v_old = old(x_t)
            v = velocity(model, x_t)

            def distance(v):
                x = x_t - 0.5 * v
                with torch.no_grad():
                    scale = (x - x0).abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=1e-5)
                return ((x - x0) ** 2 / scale).mean(dim=(1, 2, 3))

            loss = (weight * distance(v) + (1 - weight) * distance(2 * v_old - v)).mean()
            if kl:
                loss = loss + 1e-4 * ((v - base(x_t)) ** 2).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        measure(f"{trainable}: {STEPS} steps of sampling", sample)
        measure(f"{trainable}: update, old policy", lambda: update(False))
        measure(f"{trainable}: update, old policy and base model", lambda: update(True))


main()
