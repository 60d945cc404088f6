#!/usr/bin/env python3
"""What advantages do whose mean is not 0: a ring of eight modes in two dimensions, without lag.

    pip install numpy && benchmarks/offset.py       ten minutes on one core

Linear advantages of 128 images in groups of 16, plus a constant; everything else is docs/METHODS.md's
regression at v = v_old, with Adam. It prints the reward's mean after 60 updates: docs/comparison/
THEORY.md, section 6. Rewards are thirds, by the distance from the nearest mode.
"""

import numpy as np

WIDTH, GROUPS, IMAGES, TIMES = 64, 8, 16, 3


def features(x, t):
    angle = 2 * np.pi * t
    return np.concatenate([x, t[:, None], np.sin(angle)[:, None], np.cos(angle)[:, None]], 1)


def new_model(draw):
    model = []
    for inputs, outputs in ((5, WIDTH), (WIDTH, WIDTH), (WIDTH, 2)):
        model += [draw.normal(size=(inputs, outputs)) / np.sqrt(inputs), np.zeros(outputs)]
    return model


def forward(model, x, t):
    """The velocity [B, 2], and what the gradient needs."""
    first = features(x, t)
    second = np.tanh(first @ model[0] + model[1])
    third = np.tanh(second @ model[2] + model[3])
    return third @ model[4] + model[5], (first, second, third)


def gradients(model, kept, dv):
    first, second, third = kept
    d_third = (dv @ model[4].T) * (1 - third**2)
    d_second = (d_third @ model[2].T) * (1 - second**2)
    pairs = ((first, d_second), (second, d_third), (third, dv))
    return [part for inputs, d in pairs for part in (inputs.T @ d, d.sum(0))]


class Adam:
    def __init__(self, model, rate):
        self.rate, self.n = rate, 0
        self.m, self.v = [0 * p for p in model], [0 * p for p in model]

    def step(self, model, grads):
        self.n += 1
        for i, g in enumerate(grads):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
            size = np.sqrt(self.v[i] / (1 - 0.999**self.n)) + 1e-8
            model[i] = model[i] - self.rate * (self.m[i] / (1 - 0.9**self.n)) / size


def modes():
    angles = 2 * np.pi * np.arange(8) / 8
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def pretrained(updates=3000):
    draw = np.random.default_rng(0)
    model = new_model(draw)
    adam = Adam(model, 2e-3)
    for i in range(updates):
        adam.rate = 2e-3 * (1 - i / updates) + 1e-5
        x0 = modes()[draw.integers(0, 8, 256)] + 0.12 * draw.normal(size=(256, 2))
        noise, t = draw.normal(size=x0.shape), draw.uniform(0, 1, 256)
        t = 3 * t / (1 + 2 * t)
        v, kept = forward(model, (1 - t)[:, None] * x0 + t[:, None] * noise, t)
        adam.step(model, gradients(model, kept, 2 * (v - (noise - x0)) / 256))
    return model


def sample(model, draw, count, steps):
    """Samples of Euler's method, and its times."""
    x, s = draw.normal(size=(count, 2)), np.linspace(1, 1 / steps, steps)
    times = np.append(3 * s / (1 + 2 * s), 0)
    for now, later in zip(times, times[1:]):
        x = x + (later - now) * forward(model, x, np.full(count, now))[0]
    return x, times[:-1]


def reward(x):
    distance = np.sqrt(((x[:, None] - modes()) ** 2).sum(-1)).min(1)
    return np.clip(np.floor(4.2 * np.exp(-distance / 0.18)), 0, 3) / 3


def end(base, offset, seed, steps, updates=60, rate=1e-3):
    """The reward's mean after training with advantages of this mean."""
    draw, model = np.random.default_rng(1000 + seed), list(base)
    adam = Adam(model, rate)
    for _ in range(updates):
        x0, times = sample(model, draw, GROUPS * IMAGES, steps)
        rewards = reward(x0).reshape(GROUPS, IMAGES)
        centred = rewards - rewards.mean(1, keepdims=True)
        scale = max(np.sqrt((centred**2).mean()), 1e-6)
        advantage = np.repeat((centred / scale + offset).reshape(-1), TIMES)
        x0 = np.repeat(x0, TIMES, 0)
        t = np.concatenate([draw.choice(times, TIMES, False) for _ in range(GROUPS * IMAGES)])
        noise = draw.normal(size=x0.shape)
        v, kept = forward(model, (1 - t)[:, None] * x0 + t[:, None] * noise, t)
        miss = v - (noise - x0)
        w = np.maximum(t * np.abs(miss).mean(1), 1e-5)
        dv = (t**2 / w * advantage)[:, None] * miss / len(t)
        adam.step(model, gradients(model, kept, dv))
    return reward(sample(model, np.random.default_rng(42), 4000, steps)[0]).mean()


def main(offsets=(-0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 0.3), seeds=16):
    base = pretrained()
    for steps in (10, 40):
        start = reward(sample(base, np.random.default_rng(42), 4000, steps)[0]).mean()
        print(f"{steps} solver steps, start {start:.3f}", flush=True)
        for offset in offsets:
            ends = np.array([end(base, offset, seed, steps) for seed in range(seeds)])
            error = ends.std(ddof=1) / np.sqrt(seeds)
            print(f"  mean of A {offset:+.2f}: {ends.mean():.3f} +- {error:.3f}", flush=True)


if __name__ == "__main__":
    main()
