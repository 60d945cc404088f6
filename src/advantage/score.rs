//! A score: one container from the rewards to the advantages.

use serde::{Deserialize, Serialize};

/// What one reward says of one image.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Score {
    /// A number: the more, the better.
    Value(f64),
    /// The reward does not apply to the image's prompt.
    NotApplicable,
    /// It is unavailable: the image's group cannot be compared, and is left out.
    Failed,
}

impl Score {
    /// The number, where there is one.
    pub fn value(self) -> Option<f64> {
        match self {
            Score::Value(value) => Some(value),
            Score::NotApplicable | Score::Failed => None,
        }
    }

    /// As a number that travels among others: a value, which is finite, as it is; one that does not
    /// apply as NaN, one that failed as infinity.
    pub(crate) fn to_f64(self) -> f64 {
        match self {
            Score::Value(value) => value,
            Score::NotApplicable => f64::NAN,
            Score::Failed => f64::INFINITY,
        }
    }

    /// What [`Score::to_f64`] made a number of.
    pub(crate) fn from_f64(number: f64) -> Self {
        match number {
            f64::INFINITY => Score::Failed,
            number if number.is_nan() => Score::NotApplicable,
            value => Score::Value(value),
        }
    }
}

impl From<f64> for Score {
    fn from(value: f64) -> Self {
        Score::Value(value)
    }
}

/// `None`: the reward does not apply.
impl From<Option<f64>> for Score {
    fn from(score: Option<f64>) -> Self {
        score.map_or(Score::NotApplicable, Score::Value)
    }
}

/// One reward's scores of some images, with what they count.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// The reward's name.
    pub name: String,
    /// What it counts in the sum; 0: it is only watched.
    pub weight: f64,
    /// One per image.
    pub scores: Vec<Score>,
}

impl Scores {
    /// The scores by the reward `name`, which counts `weight`.
    pub fn new(name: &str, weight: f64, scores: impl IntoIterator<Item: Into<Score>>) -> Self {
        Self { name: name.into(), weight, scores: scores.into_iter().map(Into::into).collect() }
    }

    /// The numbers among the scores.
    pub fn values(&self) -> impl Iterator<Item = f64> {
        self.scores.iter().filter_map(|score| score.value())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_comes_back_from_its_number() {
        for score in [Score::Value(0.1 + 0.2), Score::Value(-1e308), Score::NotApplicable, Score::Failed] {
            assert_eq!(Score::from_f64(score.to_f64()), score);
        }
    }
}
