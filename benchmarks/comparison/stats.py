"""Intervals over seeds, and times to a level."""

import math
import random
from statistics import NormalDist, fmean

# Student's t at 97.5 % for 1 to 20 degrees of freedom.
T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
)


def tail(count):
    """The share of the bootstrap's distribution that a 95 % interval of `count` values cuts off.

    Quantiles at 2.5 % are too narrow for few values: of five they hold the mean four times in
    five. The expanded quantiles Phi(-sqrt(n / (n - 1)) t) make up for it (Hesterberg, arXiv
    1411.5279).
    """
    freedom = count - 1
    t = T_975[freedom - 1] if freedom <= len(T_975) else 1.96 + 2.372 / freedom
    return NormalDist().cdf(-math.sqrt(count / freedom) * t)


def quantile(ordered, share):
    """The quantile of values in order, on straight lines between them."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def bootstrap(rows, statistic, resamples=4000):
    """95 % interval (low, high) of a statistic of rows; (None, None) of fewer than two.

    Always the same for the same rows.
    """
    if len(rows) < 2:
        return None, None
    generator = random.Random(0)
    ordered = sorted(statistic(generator.choices(rows, k=len(rows))) for _ in range(resamples))
    share = tail(len(rows))
    return quantile(ordered, share), quantile(ordered, 1 - share)


def mean_interval(values):
    """(mean, low, high); low and high are None for one value."""
    return (fmean(values), *bootstrap(values, fmean))


def time_to(points, level):
    """Where points (x, value) first reach the level, on straight lines; None: nowhere."""
    before = None
    for x, value in points:
        if value >= level:
            if before is None:
                return x
            return before[0] + (level - before[1]) / (value - before[1]) * (x - before[0])
        before = (x, value)
    return None


def median_time(times):
    """The median of times; None, not reached, is longer than any."""
    ordered = sorted(times, key=lambda time: math.inf if time is None else time)
    middle = len(ordered) // 2
    pair = ordered[middle : middle + 1] if len(ordered) % 2 else ordered[middle - 1 : middle + 1]
    return None if None in pair else fmean(pair)


def ratio(slow, fast, ends):
    """The ratio of mean times of paired runs: (what it is, ratio, low, high).

    `slow` and `fast`: times by seed, None where the level was not reached before the run's end,
    which `ends` gives for each seed. Such a time counts as the end, so that the ratio is "exact",
    "at least" or "at most"; with both cut off it says nothing, None.
    """
    cut_slow, cut_fast = None in slow, None in fast
    rows = [
        (end if a is None else a, end if b is None else b) for a, b, end in zip(slow, fast, ends)
    ]

    def of(rows):
        return sum(a for a, _ in rows) / max(sum(b for _, b in rows), 1e-12)

    kind = {(False, False): "exact", (True, False): "at least", (False, True): "at most"}.get(
        (cut_slow, cut_fast)
    )
    return kind, of(rows), *bootstrap(rows, of)
