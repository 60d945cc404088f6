"""FlowAWR's advantages by the formulas of its released program (flow_grpo/stat_tracking.py at 05e993aa), for
tests/fixtures/advantages/flow_awr.json. Plain Python, apart from this program: python3 tests/peers/make_advantages.py"""

import json
import math
import random
from pathlib import Path

K = 24


def deviation(values):
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))


def excess(rewards, scale):
    """Softmax of the normalised rewards of a group, within 5, less 1/K."""
    mean = math.fsum(rewards) / len(rewards)
    normalised = [min(max((r - mean) / scale, -5.0), 5.0) for r in rewards]
    powers = [math.exp(a - max(normalised)) for a in normalised]
    return [p / math.fsum(powers) - 1.0 / len(rewards) for p in powers]


def soft(e):
    return [min(max(x * len(e), -3.0), 3.0) for x in e]


def hard(e):
    gate = max(deviation(e) + 1e-4, 1e-2)
    return [min(max(x / gate, -3.0), 3.0) for x in e]


def groups():
    """What a group of rewards looks like: name and K rewards each."""
    draw = random.Random(24)

    def gaussian(mean, spread):
        return [round(draw.gauss(mean, spread), 6) for _ in range(K)]

    yield "wide", gaussian(0.5, 0.3)
    yield "narrow", gaussian(0.8, 0.01)  # the floor of the gate holds
    yield "narrower", gaussian(0.2, 0.0005)
    yield "below the floor", gaussian(0.4, 0.16)
    yield "above the floor", gaussian(0.4, 0.22)
    yield "one is read", [1.0] + [0.0] * (K - 1)
    yield "one is not", [1.0] * (K - 1) + [0.0]
    yield "half", [float(i % 2) for i in range(K)]
    yield "quarters", [draw.randrange(5) / 4 for _ in range(K)]
    yield "outliers", gaussian(0.5, 0.1)[:-2] + [9.0, -7.0]


def main():
    drawn = list(groups())
    scale = deviation([r for _, rewards in drawn for r in rewards]) + 1e-4
    cases = []
    for name, rewards in drawn:
        e = excess(rewards, scale)
        floored = deviation(e) + 1e-4 < 1e-2
        cases.append({"name": name, "rewards": rewards, "floored": floored, "soft": soft(e), "hard": hard(e)})
        print(f"{name}: deviation of the softmax {deviation(e):.5f}{', below the floor' if floored else ''}")
    out = Path(__file__).parents[1] / "fixtures/advantages/flow_awr.json"
    out.write_text(json.dumps(cases, indent=1) + "\n")


main()
