"""What intervals say about predictions."""

import unittest
from types import SimpleNamespace

from comparison import Refused, verdict
from comparison.results import Arm

REGIME = SimpleNamespace(metric="m", level=0.7)


def arm(name, *ends, updates=10):
    """An arm whose seed i goes on a straight line from 0.5 to ends[i]."""
    entries = [
        {"seed": seed, "evaluations": [{"update": 0, "m": 0.5}, {"update": updates, "m": end}]}
        for seed, end in enumerate(ends)
    ]
    return Arm(REGIME, name, entries)


def word(prediction, a, b):
    return verdict.judge({"arm": "a", "than": "b", "why": ""} | prediction, {"a": a, "b": b})[0]


class Differences(unittest.TestCase):
    # paired differences 0.10, 0.11, 0.12
    A, B = arm("a", 0.70, 0.81, 0.92), arm("b", 0.60, 0.70, 0.80)

    def test_above(self):
        self.assertEqual(word({"that": "above", "by": 0.09}, self.A, self.B), "held")
        self.assertEqual(word({"that": "above", "by": 0.11}, self.A, self.B), "undecided")
        self.assertEqual(word({"that": "above", "by": 0.13}, self.A, self.B), "failed")

    def test_level(self):
        self.assertEqual(word({"that": "level", "within": 0.13}, self.A, self.B), "held")
        self.assertEqual(word({"that": "level", "within": 0.11}, self.A, self.B), "undecided")
        self.assertEqual(word({"that": "level", "within": 0.05}, self.A, self.B), "failed")
        self.assertEqual(word({"that": "level", "within": 0.05}, self.B, self.A), "failed")

    def test_the_mean_of_the_curve_can_be_asked_for(self):
        self.assertEqual(
            word({"that": "above", "by": 0.09, "measure": "mean"}, self.A, self.B), "held"
        )

    def test_one_seed_decides_nothing_and_none_is_not_run(self):
        self.assertEqual(
            word({"that": "above", "by": 0}, arm("a", 0.9), arm("b", 0.6)), "undecided"
        )
        self.assertEqual(word({"that": "above", "by": 0}, arm("a"), arm("b", 0.6)), "not run")

    def test_only_seeds_of_both_count(self):
        self.assertEqual(
            word({"that": "above", "by": 0.09}, arm("a", 0.70, 0.81, 0.92, 0.1), self.B), "held"
        )


class Times(unittest.TestCase):
    FAST, SLOW = arm("f", 0.9, 0.9, 0.9), arm("s", 0.7, 0.7, 0.7)  # 5 and 10 updates to 0.7
    NEVER = arm("n", 0.6, 0.6, 0.6)

    def of(self, times, slow, fast):
        return word({"that": "slower", "times": times}, slow, fast)

    def test_ratio_within_bounds(self):
        self.assertEqual(self.of([1.5, 5], self.SLOW, self.FAST), "held")
        self.assertEqual(self.of([2.5, 5], self.SLOW, self.FAST), "failed")

    def test_a_run_that_never_arrives_is_at_least_so_slow(self):
        self.assertEqual(self.of([1.5, float("inf")], self.NEVER, self.FAST), "held")
        self.assertEqual(self.of([1.5, 5], self.NEVER, self.FAST), "undecided")
        self.assertEqual(self.of([1, 1.5], self.NEVER, self.FAST), "failed")
        self.assertEqual(self.of([1, 5], self.FAST, self.NEVER), "failed")
        self.assertEqual(self.of([0, 5], self.FAST, self.NEVER), "held")
        self.assertEqual(self.of([0, 5], self.NEVER, self.NEVER), "undecided")


class Statements(unittest.TestCase):
    def refused(self, **prediction):
        with self.assertRaises(Refused):
            verdict.check(
                {"that": "above", "arm": "a", "than": "b", "by": 0.1, "why": "x"} | prediction,
                ["a", "b"],
                "here",
            )

    def test_what_is_no_statement_is_refused(self):
        self.refused(that="better")
        self.refused(arm="c")
        self.refused(times=[1, 2])
        self.refused(that="level")
        self.refused(measure="best")

    def test_a_statement_is_taken(self):
        verdict.check(
            {"that": "slower", "arm": "a", "than": "b", "times": [1, 2], "why": "x"},
            ["a", "b"],
            "here",
        )
        self.assertEqual(
            verdict.describe({"that": "level", "arm": "a", "than": "b", "within": 0.03}, 0.7),
            "a within 0.03 of b",
        )


if __name__ == "__main__":
    unittest.main()
