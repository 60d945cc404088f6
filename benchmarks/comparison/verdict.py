"""Predictions, and what results say about them: held, failed or undecided.

A prediction is a statement about two arms of a regime. It is held if its 95 % interval over seeds
lies wholly within what is predicted, failed if wholly outside, else undecided.

    that = "above"    `arm` ends at least `by` above `than` (paired difference)
    that = "level"    `arm` and `than` end within `within` of each other (paired difference)
    that = "slower"   `arm` takes `times` = [low, high] times the updates of `than` to the level

`measure = "mean"` takes the mean of all evaluations after the start instead of the last one.
"""

from comparison import Refused
from comparison.stats import mean_interval, ratio

KEYS = {"above": {"by"}, "level": {"within"}, "slower": {"times"}}
HELD, FAILED, UNDECIDED, PENDING = "held", "failed", "undecided", "not run"


def check(prediction, arms, where):
    """Refuses what is no statement about these arms."""
    kind = prediction.get("that")
    if kind not in KEYS:
        raise Refused(f"{where}: that = {kind!r}; a prediction is one of {', '.join(KEYS)}")
    wanted = {"that", "arm", "than", "why"} | KEYS[kind]
    unknown, missing = set(prediction) - wanted - {"measure"}, wanted - set(prediction)
    if missing or unknown:
        raise Refused(
            f"{where}: that = {kind!r} needs {sorted(wanted)}; missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    for side in ("arm", "than"):
        if prediction[side] not in arms:
            raise Refused(
                f"{where}: {side} = {prediction[side]!r} is no arm of the regime: {', '.join(arms)}"
            )
    if prediction.get("measure", "end") not in ("end", "mean"):
        raise Refused(f"{where}: measure = {prediction['measure']!r}; give \"end\" or \"mean\"")


def describe(prediction, level):
    """The statement as a sentence."""
    arm, than = prediction["arm"], prediction["than"]
    over = ", mean of all evaluations" if prediction.get("measure") == "mean" else ""
    match prediction["that"]:
        case "above":
            return f"{arm} at least {prediction['by']:g} above {than}{over}"
        case "level":
            return f"{arm} within {prediction['within']:g} of {than}{over}"
        case _:
            low, high = prediction["times"]
            times = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
            return f"{arm} takes {times} times the updates of {than} to {level:g}"


def inside(low, high, least, most):
    """The verdict on an interval that is predicted to lie within [least, most]."""
    if low >= least and high <= most:
        return HELD
    return FAILED if high < least or low > most else UNDECIDED


def judge(prediction, arms):
    """(verdict, what was found); `arms`: by name, each a comparison.results.Arm."""
    arm, than = arms[prediction["arm"]], arms[prediction["than"]]
    seeds = sorted(set(arm.runs) & set(than.runs))
    if not seeds:
        return PENDING, ""
    if prediction["that"] == "slower":
        return judge_times(prediction["times"], arm, than, seeds)
    measure = prediction.get("measure", "end")
    mean, low, high = mean_interval(
        [arm.value(seed, measure) - than.value(seed, measure) for seed in seeds]
    )
    if low is None:
        return UNDECIDED, f"{mean:+.3f}, one seed"
    found = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    if prediction["that"] == "level":
        return inside(low, high, -prediction["within"], prediction["within"]), found
    return inside(low, high, prediction["by"], float("inf")), found


def judge_times(bounds, arm, than, seeds):
    """The verdict on the ratio of the updates that two arms take to the level."""
    (least, most), ends = bounds, [arm.last("update", seed) for seed in seeds]
    slow, fast = ([side.time("update", seed) for seed in seeds] for side in (arm, than))
    kind, value, low, high = ratio(slow, fast, ends)
    if kind is None:
        return UNDECIDED, "neither reaches the level with every seed"
    bound = "" if kind == "exact" else f"{kind} "
    if low is None:
        return UNDECIDED, f"{bound}{value:.2f}, one seed"
    found = f"{bound}{value:.2f} [{low:.2f}, {high:.2f}]"
    if kind == "exact":
        return inside(low, high, least, most), found
    # A bound can only fail a prediction on its own side, and hold one that is open on the other.
    if kind == "at least":
        held, failed = low >= least and most == float("inf"), low > most
    else:
        held, failed = high <= most and least <= 0, high < least
    return HELD if held else FAILED if failed else UNDECIDED, found
