"""Intervals and times against values that are known otherwise."""

import math
import random
import unittest
from statistics import NormalDist, fmean, stdev

from comparison import stats


class Intervals(unittest.TestCase):
    def test_tail_of_many_values_is_a_fortieth(self):
        self.assertAlmostEqual(stats.tail(100_000), 0.025, places=4)

    def test_tail_of_five_values(self):
        # sqrt(5/4) x 2.776 = 3.1037, and Phi(-3.1037) = 0.000955 (tables)
        self.assertAlmostEqual(stats.tail(5), 0.000955, places=5)

    def test_quantiles_lie_on_straight_lines(self):
        self.assertEqual(
            [stats.quantile([1, 2, 4], share) for share in (0, 0.25, 0.5, 0.75, 1)],
            [1, 1.5, 2, 3, 4],
        )

    def test_two_values_give_their_own_range(self):
        self.assertEqual(stats.mean_interval([0.0, 1.0]), (0.5, 0.0, 1.0))

    def test_one_value_has_no_interval(self):
        self.assertEqual(stats.mean_interval([0.3]), (0.3, None, None))

    def test_equal_values_have_an_interval_of_no_width(self):
        self.assertEqual(stats.mean_interval([0.25] * 5), (0.25, 0.25, 0.25))

    def test_many_normal_values_give_the_normal_interval(self):
        draw = random.Random(3)
        values = [draw.gauss(2, 1) for _ in range(400)]
        mean, low, high = stats.mean_interval(values)
        half = NormalDist().inv_cdf(0.975) * stdev(values) / math.sqrt(len(values))
        self.assertAlmostEqual(mean, fmean(values))
        self.assertAlmostEqual(low, mean - half, delta=0.01)
        self.assertAlmostEqual(high, mean + half, delta=0.01)

    def test_intervals_of_five_values_hold_the_mean_nineteen_times_in_twenty(self):
        draw, held = random.Random(7), 0
        for _ in range(300):
            low, high = stats.bootstrap([draw.gauss(0, 1) for _ in range(5)], fmean, resamples=800)
            held += low <= 0 <= high
        # 0.95 of 300 is 285, deviation 3.8; plain quantiles at 2.5 % hold it about 250 times.
        self.assertGreater(held, 268)


class Times(unittest.TestCase):
    CURVE = [(0, 0.5), (10, 0.6), (20, 0.55), (30, 0.8)]

    def test_the_first_crossing_counts_on_straight_lines(self):
        self.assertAlmostEqual(stats.time_to(self.CURVE, 0.58), 8.0)
        self.assertAlmostEqual(stats.time_to(self.CURVE, 0.7), 26.0)

    def test_a_start_above_the_level_is_time_zero(self):
        self.assertEqual(stats.time_to(self.CURVE, 0.4), 0)

    def test_a_level_that_is_not_reached_has_no_time(self):
        self.assertIsNone(stats.time_to(self.CURVE, 0.81))

    def test_not_reached_is_longer_than_any_time(self):
        self.assertEqual(stats.median_time([30, None, 10]), 30)
        self.assertIsNone(stats.median_time([30, None, None]))
        self.assertIsNone(stats.median_time([30, None]))
        self.assertEqual(stats.median_time([20, 10]), 15)


class Ratios(unittest.TestCase):
    def test_equal_pairs_have_an_exact_ratio(self):
        kind, value, low, high = stats.ratio([20, 40], [10, 20], [99, 99])
        self.assertEqual((kind, value, low, high), ("exact", 2, 2, 2))

    def test_what_was_not_reached_counts_as_the_end_and_makes_a_bound(self):
        self.assertEqual(stats.ratio([None, 40], [10, 10], [40, 40])[:2], ("at least", 4))
        self.assertEqual(stats.ratio([10, 10], [None, 40], [40, 40])[:2], ("at most", 0.25))
        self.assertIsNone(stats.ratio([None], [None], [40])[0])


if __name__ == "__main__":
    unittest.main()
