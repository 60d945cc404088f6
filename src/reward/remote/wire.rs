//! What goes over the wire: requests and answers of three kinds of reward server, all JSON.

use crate::data::Prompt;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// The language of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WireFormat {
    /// This program's: `POST /score` `{"requests": [{"prompt", "image_png_b64", "metadata"}], "rewards": [name]}` ->
    /// `{"results": [{name: score or null}], "errors": [null or {name: text}]}`; null: the reward does not apply.
    Flowrl,
    /// Flow-Factory's: `POST /compute` `{"prompt": [..], "image": [base64 PNG], ..}` -> `{"rewards": [score]}`
    /// (rewards/my_reward_remote.py).
    FlowFactory,
    /// UniRL's reward service, version 1: `POST /score` `{"requests": [{"history": [{"text", "image_b64"}],
    /// "required_rewards", "metadata"}]}` -> `{"results": [{name: {part: score}}], "errors": [{name: text}]}`
    /// (reward_service/schemas.py). `name/part` names one part of a reward that has several.
    Unirl,
}

/// What a server says of one image.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Answer {
    /// A finite number.
    Score(f64),
    /// The reward does not apply to the prompt.
    NotApplicable,
    /// It could not score this image, in its words.
    Failed(String),
}

/// An image and what it is judged by.
pub(super) struct Item<'a> {
    pub prompt: &'a Prompt,
    /// Base64 of a PNG file.
    pub image: String,
}

impl WireFormat {
    /// Where requests go.
    pub fn path(self) -> &'static str {
        match self {
            WireFormat::Flowrl | WireFormat::Unirl => "score",
            WireFormat::FlowFactory => "compute",
        }
    }

    /// The body of a request.
    pub(super) fn request(self, reward: &str, items: &[&Item]) -> Value {
        let metadata = |item: &Item| -> Map<String, Value> {
            item.prompt.metadata.as_ref().map(|metadata| (**metadata).clone()).unwrap_or_default()
        };
        let each = |of: &dyn Fn(&Item) -> Value| items.iter().map(|item| of(item)).collect::<Vec<Value>>();
        match self {
            WireFormat::Flowrl => {
                let one = |item: &Item| json!({"prompt": &*item.prompt.text, "image_png_b64": item.image, "metadata": metadata(item)});
                json!({"requests": each(&one), "rewards": [reward]})
            }
            WireFormat::FlowFactory => json!({
                "prompt": each(&|item| (*item.prompt.text).into()),
                "image": each(&|item| item.image.clone().into()),
                "video": null,
                "condition_images": null,
                "condition_videos": null,
                "kwargs": null,
            }),
            WireFormat::Unirl => {
                let (reward, _) = split(reward);
                let one = |item: &Item| {
                    json!({
                        "history": [{"text": &*item.prompt.text, "image_b64": item.image}],
                        "required_rewards": [reward],
                        "metadata": metadata(item),
                    })
                };
                json!({"protocol_version": "1", "requests": each(&one)})
            }
        }
    }

    /// The answers for `count` images in their order, or what is wrong with the body.
    pub(super) fn answers(self, body: &[u8], reward: &str, count: usize) -> Result<Vec<Answer>, String> {
        let body: Value = serde_json::from_slice(body).map_err(|error| {
            let start = String::from_utf8_lossy(&body[..body.len().min(80)]);
            format!("its answer is not JSON ({error}): {:?}; NaN and Infinity are none", start.trim())
        })?;
        let answers = match self {
            WireFormat::Flowrl => per_image(&body, reward, |score| score.clone()),
            WireFormat::FlowFactory => match body.get("error").filter(|error| !error.is_null() && *error != "") {
                Some(error) => Err(format!("it says: {}", shown(error))),
                None => list(&body, "rewards").map(|all| all.iter().map(|score| Ok(score.clone())).collect()),
            },
            WireFormat::Unirl => {
                let (name, part) = split(reward);
                per_image(&body, name, |score| one_part(score, part))
            }
        }?;
        if answers.len() != count {
            return Err(format!("it gave {} scores for {count} images", answers.len()));
        }
        answers.into_iter().enumerate().map(|(i, answer)| score(answer, i)).collect()
    }
}

/// A server's word on one image: its score as it stands, or why there is none.
type Word = Result<Value, String>;

fn score(word: Word, image: usize) -> Result<Answer, String> {
    match word {
        Err(message) => Ok(Answer::Failed(message)),
        Ok(Value::Null) => Ok(Answer::NotApplicable),
        Ok(value) => match value.as_f64().filter(|score| score.is_finite()) {
            Some(score) => Ok(Answer::Score(score)),
            None => Err(format!("its score of image {image} is {}, not a finite number", shown(&value))),
        },
    }
}

/// `results[i][reward]`, or `errors[i][reward]` where it is.
fn per_image(body: &Value, reward: &str, score: impl Fn(&Value) -> Value) -> Result<Vec<Word>, String> {
    let results = list(body, "results")?;
    let none = Vec::new();
    let errors = match body.get("errors") {
        None | Some(Value::Null) => &none,
        Some(Value::Array(errors)) if errors.is_empty() || errors.len() == results.len() => errors,
        Some(_) => return Err("its errors are no list with one entry an image".to_string()),
    };
    let word = |(i, result): (usize, &Value)| {
        if let Some(error) = errors.get(i).and_then(|errors| errors.get(reward)).filter(|error| !error.is_null()) {
            return Ok(Err(error.as_str().map_or_else(|| shown(error), one_line)));
        }
        match result.get(reward) {
            Some(value) => Ok(Ok(score(value))),
            None => Err(format!("its result {i} lacks the reward {reward:?}: {}", shown(result))),
        }
    };
    results.iter().enumerate().map(word).collect()
}

/// The part of a reward of UniRL; without a name its only one. What is no such thing stays as it is, to be refused.
fn one_part(score: &Value, part: Option<&str>) -> Value {
    let found = match (part, score.as_object()) {
        (Some(part), Some(parts)) => parts.get(part),
        (None, Some(parts)) if parts.len() == 1 => parts.values().next(),
        _ => None,
    };
    found.unwrap_or(score).clone()
}

/// `name/part` as both.
fn split(reward: &str) -> (&str, Option<&str>) {
    reward.split_once('/').map_or((reward, None), |(name, part)| (name, Some(part)))
}

fn list<'a>(body: &'a Value, key: &str) -> Result<&'a Vec<Value>, String> {
    body.get(key).and_then(Value::as_array).ok_or_else(|| format!("its answer has no list {key:?}: {}", shown(body)))
}

/// The beginning of a value, in one line.
fn shown(value: &Value) -> String {
    one_line(&value.to_string())
}

/// Characters of a server's own words that are shown, at most.
const MOST: usize = 120;

/// The beginning of a server's own words, in one line and without what moves a terminal's cursor.
pub(super) fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let mut characters = words.flat_map(|word| std::iter::once(' ').chain(word.chars())).skip(1);
    let start: String = characters.by_ref().take(MOST).collect();
    if characters.next().is_none() { start } else { start + "..." }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    const FORMATS: [WireFormat; 3] = [WireFormat::Flowrl, WireFormat::FlowFactory, WireFormat::Unirl];

    /// A right answer for three images of which the last failed or does not apply.
    fn right(format: WireFormat) -> &'static str {
        match format {
            WireFormat::Flowrl => r#"{"results":[{"a":0.5},{"a":null},{}],"errors":[null,{},{"a":"no face"}]}"#,
            WireFormat::FlowFactory => r#"{"rewards":[0.5,-2,1e3]}"#,
            WireFormat::Unirl => r#"{"results":[{"a":{"x":0.5}},{"a":{"x":1}},{}],"errors":[{},{},{"a":"no face"}]}"#,
        }
    }

    #[test]
    fn right_answers_are_understood() {
        let failed = || Answer::Failed("no face".to_string());
        let of = |format: WireFormat| format.answers(right(format).as_bytes(), "a", 3);
        assert_eq!(of(WireFormat::Flowrl), Ok(vec![Answer::Score(0.5), Answer::NotApplicable, failed()]));
        assert_eq!(
            of(WireFormat::FlowFactory),
            Ok(vec![Answer::Score(0.5), Answer::Score(-2.0), Answer::Score(1000.0)])
        );
        assert_eq!(of(WireFormat::Unirl), Ok(vec![Answer::Score(0.5), Answer::Score(1.0), failed()]));
        let parts = r#"{"results":[{"hps":{"v2":0.3,"v3":7}}]}"#;
        assert_eq!(WireFormat::Unirl.answers(parts.as_bytes(), "hps/v3", 1), Ok(vec![Answer::Score(7.0)]));
    }

    #[test]
    fn wrong_answers_say_what_is_wrong() {
        for (format, body, what) in [
            (WireFormat::Flowrl, "", "is not JSON"),
            (WireFormat::Flowrl, "<html>502 Bad Gateway", "is not JSON"),
            (WireFormat::Flowrl, r#"{"results":[{"a":NaN}]}"#, "is not JSON"),
            (WireFormat::Flowrl, r#"{"results":[{"a":1e999}]}"#, "is not JSON"),
            (WireFormat::Flowrl, r#"{"error":"no such reward"}"#, r#"no list "results": {"error":"no such reward"}"#),
            (WireFormat::Flowrl, r#"{"results":[]}"#, "0 scores for 1 images"),
            (WireFormat::Flowrl, r#"{"results":[{"a":1},{"a":1}]}"#, "2 scores for 1 images"),
            (WireFormat::Flowrl, r#"{"results":[{"b":1}]}"#, r#"result 0 lacks the reward "a""#),
            (WireFormat::Flowrl, r#"{"results":[{"a":"1"}]}"#, r#"score of image 0 is "1", not a finite number"#),
            (WireFormat::Flowrl, r#"{"results":[{"a":1}],"errors":[null,null]}"#, "one entry an image"),
            (WireFormat::FlowFactory, r#"{"rewards":[[1]]}"#, "score of image 0 is [1]"),
            (WireFormat::FlowFactory, r#"{"error":"out of memory","rewards":[]}"#, "it says: \"out of memory\""),
            (WireFormat::Unirl, r#"{"results":[{"a":{"x":1,"y":2}}]}"#, r#"is {"x":1,"y":2}, not a finite number"#),
            (WireFormat::Unirl, r#"{"results":[{"a":{}}]}"#, "is {}, not a finite number"),
        ] {
            let error = format.answers(body.as_bytes(), "a", 1).unwrap_err();
            assert!(error.contains(what), "{body}: {error}");
            assert!(!error.contains('\n') && error.len() < 400, "{error}");
        }
    }

    #[test]
    fn a_servers_words_are_one_short_line() {
        let body =
            json!({"results": [{}], "errors": [{"a": format!("no\r\n\tface\u{1b}[2J\u{2028}{}", "é".repeat(5000))}]});
        let said = format!("no face [2J {}...", "é".repeat(MOST - "no face [2J ".len()));
        for format in [WireFormat::Flowrl, WireFormat::Unirl] {
            let answers = format.answers(body.to_string().as_bytes(), "a", 1);
            assert_eq!(answers, Ok(vec![Answer::Failed(said.clone())]));
        }
        assert_eq!((one_line(" a\n b "), one_line(&"a".repeat(MOST))), ("a b".into(), "a".repeat(MOST)));
    }

    /// Random bytes, and right answers with bytes changed, left out, doubled or cut off: never a panic, what is accepted
    /// is finite and of the right number, and what the server says of it is one short line.
    #[test]
    fn no_bytes_make_the_parser_fall() {
        let (mut accepted, mut said_much) = (0, 0);
        for round in 0..20_000u64 {
            let stream = Stream::new(7, Purpose::Pretrain, [round, 0, 0, 0]);
            let format = FORMATS[stream.below(0, 3)];
            let mut bytes = right(format).as_bytes().to_vec();
            if stream.below(1, 8) == 0 {
                bytes = (0..stream.below(2, 64) as u32).map(|i| stream.word(8 + i) as u8).collect();
            }
            for change in 0..stream.below(3, 6) as u32 {
                let word = |part: u32, n: usize| stream.below(100 + 4 * change + part, n.max(1));
                let at = word(1, bytes.len());
                match word(0, 6) {
                    0 if !bytes.is_empty() => bytes[at] = word(2, 256) as u8,
                    1 if !bytes.is_empty() => drop(bytes.remove(at)),
                    2 => bytes.insert(at.min(bytes.len()), br#"{}[],:"0e-n"#[word(2, 11)]),
                    3 => bytes.truncate(at),
                    4 => {
                        let text = br"\n\u001b\u2028 no face \r\t".repeat(word(2, 40));
                        bytes.splice(at.min(bytes.len())..at.min(bytes.len()), text);
                    }
                    _ => {
                        let piece = bytes[at.min(bytes.len())..(at + word(2, 20)).min(bytes.len())].to_vec();
                        bytes.splice(at.min(bytes.len())..at.min(bytes.len()), piece);
                    }
                }
            }
            let short = |text: &str, most: usize| {
                let one = !text.contains(|c: char| c.is_control() || c == '\u{2028}');
                assert!(one && text.chars().count() <= most, "{text}");
            };
            match format.answers(&bytes, "a", 3) {
                Ok(answers) => {
                    accepted += 1;
                    assert_eq!(answers.len(), 3);
                    for answer in answers {
                        match answer {
                            Answer::Score(score) => assert!(score.is_finite()),
                            Answer::NotApplicable => (),
                            Answer::Failed(message) => {
                                said_much += usize::from(message.ends_with("..."));
                                short(&message, MOST + 3);
                            }
                        }
                    }
                }
                Err(message) => short(&message, 1000),
            }
        }
        assert!(said_much > 20, "only {said_much} long messages: the test tries too little");
        assert!(accepted > 1000, "only {accepted} answers were still right: the test tries too little");
    }
}
