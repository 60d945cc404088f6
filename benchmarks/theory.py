#!/usr/bin/env python3
"""The numbers of docs/comparison/THEORY.md, in half a minute: efficiencies of the maps, the model
of a lagging old policy against a simulation, and what the model says of the regimes.

    benchmarks/theory.py
"""

import math
import random
from statistics import fmean

# --- advantages, written down anew from docs/METHODS.md ---


def deviation(values):
    mean = fmean(values)
    return math.sqrt(fmean((value - mean) ** 2 for value in values))


def clip(value, bound):
    return max(-bound, min(bound, value))


def scaled(groups, scale, bound):
    """Distances from the group's mean in global or pooled deviations, within the bound."""
    centred = [[reward - fmean(group) for reward in group] for group in groups]
    everything = [reward for group in groups for reward in group]
    unit = (
        deviation(everything) + 1e-4
        if scale == "global"
        else math.sqrt(fmean(c * c for group in centred for c in group))
    )
    return [[clip(c / (unit or math.inf), bound) for c in group] for group in centred]


def softmax(group):
    powers = [math.exp(a - max(group)) for a in group]
    return [power / sum(powers) for power in powers]


def soft(group, bound):
    return [min(len(group) * p - 1, bound) for p in softmax(group)]


def gated(group):
    excess = [p - 1 / len(group) for p in softmax(group)]
    gate = max(deviation(excess) + 1e-4, 1e-2)
    return [clip(e / gate, 3) for e in excess]


MAPS = {
    "linear, bound 5 (DiffusionNFT)": lambda groups: scaled(groups, "global", 5),
    "linear, bound 1 (AdvantageFlow)": lambda groups: scaled(groups, "pooled", 1),
    "linear, bound 2.5": lambda groups: scaled(groups, "pooled", 2.5),
    "soft, bound 3 (FlowAWR)": lambda groups: [
        soft(group, 3) for group in scaled(groups, "global", 5)
    ],
    "gated (FlowAWR)": lambda groups: [gated(group) for group in scaled(groups, "global", 5)],
    "soft, no bound (its paper)": lambda groups: [
        soft(group, math.inf) for group in scaled(groups, "global", math.inf)
    ],
}

# --- reward laws: (what is observed, what is meant) of a group ---


def gaussian(draw, k):
    rewards = [draw.gauss(0, 1) for _ in range(k)]
    return rewards, rewards


def readable(draw, k):
    """Three digits, each read with a probability of the image's own, half of whose variance is the
    prompt's: mean, variance and exact share (0.595, 0.117, 0.30) are those of the embedded base
    model (0.595, 0.117, 0.285).
    """
    quality = draw.gauss(0, 1)
    rewards = []
    for _ in range(k):
        z = math.sqrt(0.5) * quality + math.sqrt(0.5) * draw.gauss(0, 1)
        chance = 1 / (1 + math.exp(-(0.48 + 1.33 * z)))
        rewards.append(sum(draw.random() < chance for _ in range(3)) / 3)
    return rewards, rewards


def rare(draw, k):
    rewards = [float(draw.random() < 0.05) for _ in range(k)]
    return rewards, rewards


def broken(draw, k):
    """One score in a hundred is 10, whatever the image shows."""
    _, meant = readable(draw, k)
    return [10.0 if draw.random() < 0.01 else reward for reward in meant], meant


LAWS = {
    "Gaussian, K = 24": (gaussian, 24),
    "readable, K = 16": (readable, 16),
    "5 % successes, K = 16": (rare, 16),
    "1 % outliers, K = 16": (broken, 16),
}


def efficiency(law, k, mapped, prompts=8, iterations=400):
    """(e, rms A, mean A): e = E[A c] / (rms A rms c), c the meant reward less its group's mean."""
    draw = random.Random(1)
    product = squares = meant_squares = total = count = 0.0
    for _ in range(iterations):
        pairs = [law(draw, k) for _ in range(prompts)]
        for a, (_, meant) in zip(mapped([observed for observed, _ in pairs]), pairs):
            mean = fmean(meant)
            product += sum(x * (y - mean) for x, y in zip(a, meant))
            squares += sum(x * x for x in a)
            meant_squares += sum((y - mean) ** 2 for y in meant)
            total += sum(a)
            count += len(a)
    return product / math.sqrt(squares * meant_squares), math.sqrt(squares / count), total / count


# --- the policy held by its old policy: Adam on noisy regressions ---


class Race:
    """`d` weights, each to be moved for ever. An update's gradient of a weight is
    `k (theta - old) - noise`, the mean of `batch` samples A g with A, g of deviation 1 whose mean
    product is `signal`: the regression to old + A g / k.
    """

    def __init__(self, strength, eta, updates, rate, batch, signal=0.1, d=24, seed=1):
        self.k, self.eta, self.updates, self.rate, self.batch, self.signal = (
            strength,
            eta,
            updates,
            rate,
            batch,
            signal,
        )
        self.draw, self.theta, self.old = random.Random(seed), [0.0] * d, [0.0] * d
        self.m, self.v, self.n = [0.0] * d, [0.0] * d, 0

    def iteration(self):
        for _ in range(self.updates):
            self.n += 1
            for j in range(len(self.theta)):
                noise = self.signal + self.draw.gauss(0, 1) / math.sqrt(self.batch)
                gradient = self.k * (self.theta[j] - self.old[j]) - noise
                self.m[j] = 0.9 * self.m[j] + 0.1 * gradient
                self.v[j] = 0.999 * self.v[j] + 0.001 * gradient * gradient
                step = (self.m[j] / (1 - 0.9**self.n)) / (
                    math.sqrt(self.v[j] / (1 - 0.999**self.n)) + 1e-8
                )
                self.theta[j] -= self.rate * step
        self.old = [self.eta * o + (1 - self.eta) * t for o, t in zip(self.old, self.theta)]

    def speed(self, iterations):
        """Progress of the old policy an iteration in the second half."""
        for _ in range(iterations // 2):
            self.iteration()
        before = fmean(self.old)
        for _ in range(iterations - iterations // 2):
            self.iteration()
        return (fmean(self.old) - before) / (iterations - iterations // 2)


def relaxation(strength, rate, batch, signal=0.1):
    """T in updates: theta - old decays by k rate / rms an update, rms that of the gradient."""
    rms = math.sqrt(signal**2 + 1 / batch)
    return rms / (strength * rate)


def predicted(strength, eta, updates, rate, batch, signal=0.1):
    """The model's progress an iteration: s T (1 - k) (1 - eta) / (1 - eta k)."""
    rms = math.sqrt(signal**2 + 1 / batch)
    s, keep = (
        rate * signal / rms,
        max(0.0, 1 - 1 / relaxation(strength, rate, batch, signal)) ** updates,
    )
    return s * relaxation(strength, rate, batch, signal) * (1 - keep) * (1 - eta) / (1 - eta * keep)


# --- the regimes ---

# kappa, rms A and e of an arm, for the readable rewards.
ARMS = {
    "DiffusionNFT(1)": (5, 0.86, 1.00),
    "DiffusionNFT(0.2)": (1, 0.86, 1.00),
    "FlowAWR, gated": (1, 0.99, 0.92),
    "AdvantageFlow(1-A)": (1, 0.74, 0.96),
}
# T_1 of the embedded task at 4e-4 and 128 images an update: from one trial (THEORY.md).
T_ONE = 7.6


def fraction(kappa, rms, e, eta, updates, rate, images):
    """Progress of the old policy an iteration, in free updates of this size with A = c."""
    t = T_ONE * (4e-4 / rate) * math.sqrt(128 / images) * rms / kappa
    keep = max(0.0, 1 - 1 / t) ** updates
    return e * t * (1 - keep) * (1 - eta) / (1 - eta * keep)


REGIMES = (
    ("eta 0.9", 0.9, 1, 128),
    ("eta 0.5", 0.5, 1, 128),
    ("20 updates of 8 images", 0.0, 20, 8),
    ("4 updates of 40 images", 0.0, 4, 40),
    ("papers' schedule, update 100", 0.1, 1, 128),
    ("papers' schedule, update 500", 0.5, 1, 128),
    ("the same, noise of 27 times the points", 0.5, 1, 27 * 128),
)


def main():
    print("| rewards | map | e | rms A | mean A |\n|---|---|---|---|---|")
    for name, (law, k) in LAWS.items():
        for what, mapped in MAPS.items():
            e, rms, mean = efficiency(law, k, mapped)
            print(f"| {name} | {what} | {e:.2f} | {rms:.2f} | {mean:+.3f} |")
    print(
        "\n| eta | updates | lr | T(1) | speed, k = 1 | k = 5 | ratio | model's ratio |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for eta, updates, rate in (
        (0.0, 1, 0.02),
        (0.5, 1, 0.02),
        (0.9, 1, 0.02),
        (0.9, 1, 0.005),
        (0.0, 4, 0.02),
        (0.0, 20, 0.02),
        (0.0, 20, 0.005),
    ):
        count = 400 if updates == 1 else 60
        speeds = [Race(k, eta, updates, rate, 16).speed(count) for k in (1, 5)]
        model = [predicted(k, eta, updates, rate, 16) for k in (1, 5)]
        print(
            f"| {eta} | {updates} | {rate} | {relaxation(1, rate, 16):.0f} | "
            f"{speeds[0]:.5f} | {speeds[1]:.5f} | "
            f"{speeds[0] / speeds[1]:.2f} | {model[0] / model[1]:.2f} |"
        )
    print(
        "\n| regime | lr | "
        + " | ".join(ARMS)
        + " | DiffusionNFT(0.2) / (1) |\n|"
        + "---|" * (len(ARMS) + 3)
    )
    for name, eta, updates, images in REGIMES:
        for rate in (2e-4, 4e-4, 8e-4) if "papers" not in name and "same" not in name else (3e-4,):
            of = [fraction(*arm, eta, updates, rate, images) for arm in ARMS.values()]
            print(
                f"| {name} | {rate:g} | "
                + " | ".join(f"{x:.2f}" for x in of)
                + f" | {of[1] / of[0]:.1f} |"
            )


if __name__ == "__main__":
    main()
