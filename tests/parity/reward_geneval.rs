//! GenEval's rules on detections, by cases worked out by hand.

use flowrl_dist::data::geneval::{Record, Tag};
use flowrl_dist::reward::geneval::{Detection, Verdict, verdict};

fn record(json: &str) -> Record {
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(json).unwrap();
    Record::of(&object.into()).unwrap().unwrap()
}

fn seen(class: &str, confidence: f64, colour: &str, bounds: [f64; 4]) -> Detection {
    let colour = Some(colour.to_string()).filter(|colour| !colour.is_empty());
    Detection { class: class.into(), bounds, confidence, colour }
}

/// So many cats of a confidence, side by side.
fn cats(count: usize, confidence: f64) -> Vec<Detection> {
    (0..count).map(|i| seen("cat", confidence, "", [20.0 * i as f64, 0.0, 20.0 * i as f64 + 10.0, 10.0])).collect()
}

fn check(record: &Record, detections: &[Detection], reward: f64, strict: bool, correct: bool) {
    let found = verdict(record, detections);
    let Verdict { reward: marks, .. } = found;
    assert!((marks - reward).abs() < 1e-12, "{found:?}, not {reward}: {detections:?}");
    assert_eq!((found.strict, found.correct), (strict, correct), "{detections:?}");
}

#[test]
fn numbers_are_marked_in_part() {
    let three = record(
        r#"{"tag": "counting", "include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}]}"#,
    );
    assert_eq!(three.tag, Tag::Counting);
    check(&three, &cats(3, 0.95), 1.0, true, true);
    check(&three, &cats(2, 0.95), 2.0 / 3.0, false, false);
    check(&three, &cats(4, 0.95), 2.0 / 3.0, false, false); // excluded
    check(&three, &cats(7, 0.95), -1.0 / 3.0, false, false);
    check(&three, &cats(40, 0.95), 1.0 - 13.0 / 3.0, false, false); // of a class 16 count
    check(&three, &cats(3, 0.9), 0.0, false, false); // a number asks for confidence above 0.9
    check(&three, &[], 0.0, false, false);

    let one = record(r#"{"tag": "single_object", "include": [{"class": "cat", "count": 1}]}"#);
    check(&one, &cats(1, 0.31), 1.0, true, true);
    check(&one, &cats(1, 0.3), 0.0, false, false);
    check(&one, &cats(2, 0.5), 0.0, false, true); // the benchmark does not mind one more
    check(&one, &[seen("dog", 0.9, "", [0.0; 4])], 0.0, false, false);
}

#[test]
fn a_colour_counts_where_the_number_is_right() {
    let red = record(r#"{"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}"#);
    let cat = |colour: &str, confidence: f64| seen("cat", confidence, colour, [0.0, 0.0, 9.0, 9.0]);
    check(&red, &[cat("red", 0.5)], 1.0, true, true);
    check(&red, &[cat("blue", 0.5)], 0.5, false, false);
    check(&red, &[cat("", 0.5)], 0.5, false, false);
    check(&red, &[], 0.0, false, false);
    // Two cats: the number is off, so the colour gets nothing; the benchmark looks at the surer one.
    check(&red, &[cat("blue", 0.4), cat("red", 0.5)], 0.0, false, true);
    check(&red, &[cat("blue", 0.6), cat("red", 0.5)], 0.0, false, false);

    let both = record(
        r#"{"tag": "color_attr", "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]}"#,
    );
    let dog = |colour: &str| seen("dog", 0.5, colour, [20.0, 0.0, 29.0, 9.0]);
    check(&both, &[cat("red", 0.5), dog("blue")], 1.0, true, true);
    check(&both, &[cat("red", 0.5), dog("red")], 0.75, false, false);
    check(&both, &[cat("red", 0.5)], 0.5, false, false);
}

/// Boxes of 10 by 10 around a dog at (50, 50): the tenth of the sizes is 2, so an offset counts less 2.
#[test]
fn positions_are_those_of_centres_beyond_a_tenth_of_the_sizes() {
    let placed = |relation: &str| {
        record(&format!(
            r#"{{"tag": "position", "include": [{{"class": "dog", "count": 1}}, {{"class": "cat", "count": 1, "position": ["{relation}", 0]}}]}}"#
        ))
    };
    let at = |class: &str, x: f64, y: f64| seen(class, 0.5, "", [x - 5.0, y - 5.0, x + 5.0, y + 5.0]);
    let dog = at("dog", 50.0, 50.0);
    for (relation, x, y, right) in [
        ("left of", 30.0, 50.0, true),
        ("right of", 30.0, 50.0, false),
        ("right of", 70.0, 50.0, true),
        ("above", 50.0, 30.0, true),
        ("below", 50.0, 30.0, false),
        ("below", 50.0, 70.0, true),
        ("left of", 48.0, 50.0, false), // within the tenth
        // Diagonal, 20 and 20: (20 - 2) / 28.3 = 0.64 both ways.
        ("left of", 30.0, 30.0, true),
        ("above", 30.0, 30.0, true),
        // 10 left and 20 up: (10 - 2) / 22.4 = 0.36, (20 - 2) / 22.4 = 0.80.
        ("left of", 40.0, 30.0, false),
        ("above", 40.0, 30.0, true),
    ] {
        // Both are there: 2 marks; the position: 1, or 0 and 1.
        let reward = if right { 1.0 } else { 3.0 / 4.0 };
        check(&placed(relation), &[dog.clone(), at("cat", x, y)], reward, right, right);
    }
    // No dog: its 0, the cat's 1, and 0 for the position that is to nothing.
    check(&placed("left of"), &[at("cat", 30.0, 50.0)], 1.0 / 3.0, false, false);
    // No cat: the dog's 1, the cat's 0, and 0 for the position.
    check(&placed("left of"), &[dog], 1.0 / 3.0, false, false);
}
