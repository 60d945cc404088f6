#!/usr/bin/env python3
"""An iteration of DiffusionNFT on one GPU in PyTorch, in the order of work of its own program.

After scripts/train_nft_sd3.py and config/nft.py of NVlabs/DiffusionNFT (24af555): the base model in fp32 under
autocast, rollouts of the old adapter without guidance, pictures decoded under the same autocast, then for each
micro-batch and each of 9 timesteps three forward passes (old, policy, base model) and a backward pass that keeps its
activations; clip, AdamW, EMA, the old adapter's step. Its sizes: LoRA of rank 32, micro-batches of 9, dpm2 with 10
steps, KL 1e-4.

What differs, all of it in favour of PyTorch: no DDP, no PEFT, no text encoders (embeddings are random), no model for a
reward but the pictures' smoothness, nothing is logged; bf16 instead of fp16, which wants no scaled gradients. Weights
are random. Prints one line of JSON with seconds, images a second, and the GPU's memory in use.
"""

import argparse
import json
import time
import warnings
from contextlib import contextmanager

import torch
from model import MEDIUM, TINY, Decoder, Linear, Transformer

RATE, DECAY, MIX, KL, BOUND = 3e-4, 1e-4, 1.0, 1e-4, 5.0


@contextmanager
def adapter(name):
    """The adapter that linear layers add; None: the base model."""
    before, Linear.active = Linear.active, name
    try:
        yield
    finally:
        Linear.active = before


def sigmas(steps, shift=3.0):
    """The times of diffusers' FlowMatchEulerDiscreteScheduler, which shifts the least of them twice, and 0."""

    def shifted(s):
        return shift * s / (1 + (shift - 1) * s)

    grid = torch.linspace(1000, 1000 * shifted(1e-3), steps, dtype=torch.float64) / 1000
    return torch.cat([shifted(grid), torch.zeros(1, dtype=torch.float64)])


def dpm2(velocity, z, times):
    """DPM-Solver++ of second order, multistep, without noise: x0 from z at times[0] = 1."""
    before = None
    for i, (s, t) in enumerate(zip(times, times[1:])):
        told = torch.full((z.shape[0],), int(1000 * float(s)), device=z.device) / 1000
        x0 = z.float() - float(s) * velocity(z, told).float()
        estimate = x0
        if 1 < i < len(times) - 2:
            step, last = (torch.logit(1 - times[j + 1]) - torch.logit(1 - times[j]) for j in (i, i - 1))
            estimate = x0 + float(step / last / 2) * (x0 - before)
        z = (float(t / s) * z.float() + float((1 - t) - (1 - s) * t / s) * estimate).to(z.dtype)
        before = x0
    return z


def advantages(rewards, group):
    """[N], group after group: less the group's mean, over the deviation of all."""
    means = rewards.view(-1, group).mean(1, keepdim=True)
    return (rewards.view(-1, group) - means).flatten() / (rewards.std(correction=0) + 1e-4)


def objective(v, old, reference, x_t, x0, t, advantage, mix=MIX, kl=KL):
    """DiffusionNFT's loss, its two branches scaled by their distance from x0, and the distance from the base model."""
    t = t.view(-1, 1, 1, 1)
    share = (advantage.clamp(-BOUND, BOUND) / BOUND / 2 + 0.5).clamp(0, 1)
    branches = []
    for branch in (mix * v + (1 - mix) * old, (1 + mix) * old - mix * v):
        estimate = x_t - t * branch
        with torch.no_grad():
            scale = (estimate.double() - x0.double()).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)
        branches.append(((estimate - x0) ** 2 / scale).mean((1, 2, 3)))
    policy = share * branches[0] / mix + (1 - share) * branches[1] / mix
    return BOUND * policy.mean() + kl * ((v - reference) ** 2).mean((1, 2, 3)).mean()


class Clock:
    """Seconds of phases, and what the GPU holds at their ends: torch keeps what it has had."""

    def __init__(self, device):
        self.device, self.seconds, self.gigabytes = device, {}, {}
        self.begun = self.since = self.now()

    def now(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def end(self, phase):
        now = self.now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            self.gigabytes[phase] = (total - free) / 1e9
        self.since = self.now()

    def rows(self, images):
        self.seconds["iteration"] = self.since - self.begun
        self.gigabytes["iteration"] = max(self.gigabytes.values(), default=None)
        return [
            {"phase": phase, "images": images, "s": s, "rate": images / s, "gb": self.gigabytes.get(phase)}
            for phase, s in self.seconds.items()
        ]


class Trainer:
    def __init__(self, arguments):
        self.arguments, self.device = arguments, arguments.device
        self.size = TINY if arguments.size == "tiny" else MEDIUM
        torch.manual_seed(1)
        with torch.device(self.device):
            self.transformer = Transformer(self.size, ("policy", "old"))
            self.decoder = Decoder(self.size).requires_grad_(False)
        self.transformer.requires_grad_(False)
        self.policy, self.old = self.adapters("policy"), self.adapters("old")
        for parameter, old in zip(self.policy, self.old):
            parameter.requires_grad_(True)
            old.data.copy_(parameter.data)
        self.ema = [parameter.detach().clone() for parameter in self.policy]
        self.optimizer = torch.optim.AdamW(self.policy, lr=RATE, weight_decay=DECAY)
        self.times = sigmas(arguments.steps)

    def adapters(self, name):
        return [p for n, p in self.transformer.named_parameters() if f".adapters.{name}." in n]

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16)

    def normals(self, *shape):
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    @torch.no_grad()
    def rollout(self, text, pooled, clock):
        """Latents [B, 16, H, W] and rewards [B] of the old adapter's pictures."""
        noise = self.normals(len(text), 16, self.size.latent, self.size.latent)
        with self.autocast(), adapter("old"):
            latents = dpm2(lambda z, t: self.transformer(z, t, text, pooled), noise, self.times)
            clock.end("rollout")
            pictures = (self.decoder((latents / 1.5305 + 0.0609).float()) / 2 + 0.5).clamp(0, 1).float()
        smoothness = -(pictures.diff(dim=2).abs().mean((1, 2, 3)) + pictures.diff(dim=3).abs().mean((1, 2, 3)))
        rewards = smoothness.cpu()
        clock.end("decode and reward")
        return latents, rewards

    def gradients(self, x0, t, advantage, text, pooled, share):
        """Adds the gradients of one micro-batch at one timestep a sample."""
        at = t.view(-1, 1, 1, 1)
        x_t = (1 - at) * x0 + at * torch.randn_like(x0.float())
        with self.autocast():
            with torch.no_grad(), adapter("old"):
                old = self.transformer(x_t, t, text, pooled)
            v = self.transformer(x_t, t, text, pooled)
            with torch.no_grad(), adapter(None):
                reference = self.transformer(x_t, t, text, pooled)
        loss = objective(v, old, reference, x_t, x0, t, advantage)
        (loss * share).backward()
        return loss.detach()

    def iteration(self, prompts, images, timesteps):
        """Rollout and one update on `prompts` groups of `images`; the phases' rows."""
        count, batch = prompts * images, self.arguments.micro_batch
        text = self.normals(prompts, self.arguments.text, self.size.context).repeat_interleave(images, 0)
        pooled = self.normals(prompts, self.size.pooled).repeat_interleave(images, 0)
        clock = Clock(self.device)
        latents, rewards = zip(*(self.rollout(*part, clock) for part in zip(text.split(batch), pooled.split(batch))))
        x0, advantage = torch.cat(latents), advantages(torch.cat(rewards), images).to(self.device)

        order = torch.randperm(count, device=self.device)
        grid = self.times[:-1].float().to(self.device)
        times = grid[torch.stack([torch.randperm(len(grid)) for _ in range(count)]).to(self.device)]
        losses = []
        for part in order.split(batch):
            for step in range(timesteps):
                share = len(part) / count / timesteps
                sample = (x0[part], times[part, step], advantage[part], text[part], pooled[part])
                losses.append(self.gradients(*sample, share))
        torch.nn.utils.clip_grad_norm_(self.policy, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.policy, 0.1)
            torch._foreach_lerp_(self.old, self.policy, 0.999)
        loss = torch.stack(losses).mean().item()
        clock.end("training")
        if not torch.isfinite(torch.tensor(loss)):
            raise SystemExit("diffusion_nft: the loss is not finite")
        return clock.rows(count)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--images", type=int, default=24, help="of a prompt")
    parser.add_argument("--micro-batch", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timesteps", type=int, default=9)
    parser.add_argument("--text", type=int, default=205, help="tokens")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="medium", choices=("medium", "tiny"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "Mismatch dtype")  # norms of q and k are fp32 times bf16, as in diffusers
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    trainer = Trainer(arguments)
    trainer.iteration(1, arguments.micro_batch, 1)  # for warmth
    print(json.dumps(trainer.iteration(arguments.prompts, arguments.images, arguments.timesteps)))


if __name__ == "__main__":
    main()
