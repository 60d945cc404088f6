//! What a request's images score: decoded a few at a time, so that memory is bounded however well they compress.

use super::Refusal;
use crate::data::Prompt;
use crate::error::Result;
use crate::reward::Reward;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_core::{Device, Tensor};
use image::{ImageFormat, ImageReader, Limits, RgbImage};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io::Cursor;
use std::marker::PhantomData;

/// Images of a request, and the rewards that it may ask for, at most.
const MOST_IMAGES: usize = 1024;
const MOST_REWARDS: usize = 64;
/// Bytes of a prompt, at most.
const MOST_PROMPT: usize = 16 << 10;
/// Pixels on a side of an image, and of its longer side for each one of the shorter, at most. Scorers enlarge a thin strip
/// to the height they read at, and what takes a kilobyte would take them a minute.
const MOST_SIDE: u32 = 4096;
const MOST_ASPECT: u32 = 16;
/// Pixels of an image, and of all images of a request, at most.
const MOST_PIXELS: u64 = 1 << 22;
const MOST_PIXELS_IN_ALL: u64 = 1 << 28;
/// Pixels that are decoded and scored at a time: with an image's floats and a scorer's copies some 300 MB. And images: a
/// scorer enlarges small ones to the size it reads at, and who has gone is not scored for longer than these take.
const PIXELS_AT_A_TIME: u64 = 1 << 23;
const IMAGES_AT_A_TIME: u64 = 16;

/// The body of a request.
#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    requests: Bounded<One<'a>, MOST_IMAGES>,
    rewards: Bounded<String, MOST_REWARDS>,
}

#[derive(Deserialize)]
struct One<'a> {
    prompt: String,
    #[serde(borrow)]
    image_png_b64: Cow<'a, str>,
    #[serde(default, rename = "metadata")]
    _metadata: Option<Metadata>,
}

/// An object that no reward of this program looks into: passed over, however large.
#[derive(Deserialize)]
struct Metadata {}

/// A list of at most `MOST` entries: a longer one is refused before it is in memory.
struct Bounded<T, const MOST: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Bounded<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct List<T, const MOST: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for List<T, MOST> {
            type Value = Bounded<T, MOST>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a list of up to {MOST}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> std::result::Result<Self::Value, A::Error> {
                let mut list = Vec::new();
                while let Some(entry) = entries.next_element()? {
                    if list.len() == MOST {
                        return Err(A::Error::custom(format!("a list of more than {MOST}; send several requests")));
                    }
                    list.push(entry);
                }
                Ok(Bounded(list))
            }
        }
        deserializer.deserialize_seq(List(PhantomData))
    }
}

/// `{"results": [{name: score or null}], "errors": [null or {name: text}]}` of a request's body; nothing more is scored once
/// its client has `gone`.
pub(super) fn answer(
    rewards: &[Box<dyn Reward>],
    body: &[u8],
    gone: &dyn Fn() -> bool,
) -> std::result::Result<Value, Refusal> {
    let left = || (StatusCode::REQUEST_TIMEOUT, "the client has gone".to_string());
    if gone() {
        return Err(left());
    }
    let body: Body = serde_json::from_slice(body).map_err(|error| bad(error.to_string()))?;
    let (requests, wanted) = (body.requests.0, wanted(rewards, &body.rewards.0)?);
    let (chunks, wrong) = chunks(&requests)?;
    let mut answers = Answers { results: vec![Map::new(); requests.len()], errors: vec![Map::new(); requests.len()] };
    for (image, message) in wrong {
        answers.failed(&[image], &wanted, &message);
    }
    for chunk in chunks {
        score(&requests, &chunk, &wanted, &mut answers, gone);
        if gone() {
            return Err(left());
        }
    }
    Ok(answers.into_json())
}

/// Decodes and scores images of one size; by no further reward once the client has `gone`.
fn score(requests: &[One], chunk: &[usize], wanted: &[&dyn Reward], answers: &mut Answers, gone: &dyn Fn() -> bool) {
    let (mut places, mut pictures, mut prompts) = (Vec::new(), Vec::new(), Vec::new());
    for &place in chunk {
        match picture(&requests[place].image_png_b64) {
            Ok(picture) => {
                places.push(place);
                pictures.push(picture);
                prompts.push(Prompt::new(place, requests[place].prompt.clone()));
            }
            Err(message) => answers.failed(&[place], wanted, &message),
        }
    }
    if places.is_empty() {
        return;
    }
    let images = match images(&pictures) {
        Ok(images) => images, // [B, 3, H, W]
        Err(error) => return answers.failed(&places, wanted, &error.to_string()),
    };
    drop(pictures);
    for &reward in wanted {
        if gone() {
            return; // what is missing is told to nobody
        }
        match reward.score(&images, &prompts) {
            Ok(scores) => places.iter().zip(scores).for_each(|(&place, score)| answers.scored(place, reward, score)),
            Err(error) => answers.failed(&places, &[reward], &error.to_string()),
        }
    }
}

/// What is said of each image.
struct Answers {
    results: Vec<Map<String, Value>>,
    errors: Vec<Map<String, Value>>,
}

impl Answers {
    fn scored(&mut self, image: usize, reward: &dyn Reward, score: Option<f64>) {
        match score {
            Some(score) if !score.is_finite() => self.failed(&[image], &[reward], &format!("the score is {score}")),
            score => drop(self.results[image].insert(reward.name().to_string(), score.into())),
        }
    }

    fn failed(&mut self, images: &[usize], rewards: &[&dyn Reward], message: &str) {
        for &image in images {
            self.errors[image].extend(rewards.iter().map(|reward| (reward.name().to_string(), message.into())));
        }
    }

    fn into_json(self) -> Value {
        let none_or = |errors: Map<String, Value>| if errors.is_empty() { Value::Null } else { errors.into() };
        let errors: Vec<Value> = self.errors.into_iter().map(none_or).collect();
        json!({"results": self.results, "errors": errors})
    }
}

fn bad(message: String) -> Refusal {
    (StatusCode::BAD_REQUEST, message)
}

/// The rewards of these names, each once.
fn wanted<'a>(rewards: &'a [Box<dyn Reward>], names: &[String]) -> std::result::Result<Vec<&'a dyn Reward>, Refusal> {
    let mut wanted: Vec<&dyn Reward> = Vec::new();
    for name in names {
        if wanted.iter().any(|reward| reward.name() == name) {
            return Err(bad(format!("reward {name:?} is asked for twice")));
        }
        let Some(found) = rewards.iter().find(|reward| reward.name() == name) else {
            let names: Vec<&str> = rewards.iter().map(|reward| reward.name()).collect();
            return Err(bad(format!("there is no reward {name:?}, but {}", names.join(", "))));
        };
        wanted.push(&**found);
    }
    Ok(wanted)
}

/// Images of one size, by number, as many as are decoded at a time; and those that are none, with what is wrong with them.
type Chunks = (Vec<Vec<usize>>, Vec<(usize, String)>);

/// Sorts a request's images by what they say of their size, before any is decoded.
fn chunks(requests: &[One]) -> std::result::Result<Chunks, Refusal> {
    let mut alike: BTreeMap<(u32, u32), Vec<usize>> = BTreeMap::new();
    let (mut wrong, mut pixels) = (Vec::new(), 0);
    for (i, One { prompt, image_png_b64, .. }) in requests.iter().enumerate() {
        if prompt.len() > MOST_PROMPT {
            return Err(bad(format!("image {i}: a prompt of {} bytes; send up to {MOST_PROMPT}", prompt.len())));
        }
        match declared_size(image_png_b64) {
            Err(message) => wrong.push((i, message)),
            Ok((width, height)) => {
                check_size(width, height).map_err(|message| bad(format!("image {i}: {message}")))?;
                pixels += u64::from(width) * u64::from(height);
                alike.entry((width, height)).or_default().push(i);
            }
        }
    }
    if pixels > MOST_PIXELS_IN_ALL {
        let message = format!("{pixels} pixels in all images; send up to {MOST_PIXELS_IN_ALL}");
        return Err((StatusCode::PAYLOAD_TOO_LARGE, message));
    }
    let mut chunks = Vec::new();
    for ((width, height), images) in alike {
        let pixels = (u64::from(width) * u64::from(height)).max(1);
        let at_a_time = (PIXELS_AT_A_TIME / pixels).min(IMAGES_AT_A_TIME);
        chunks.extend(images.chunks(at_a_time as usize).map(<[usize]>::to_vec));
    }
    Ok((chunks, wrong))
}

/// Width and height that a PNG file says it has: after its signature and the length and name of its first chunk, which
/// must be IHDR.
fn declared_size(base64: &str) -> std::result::Result<(u32, u32), String> {
    const CHARACTERS: usize = 32; // of 24 bytes
    let start = base64.as_bytes().get(..CHARACTERS).ok_or("the image is too short for a PNG")?;
    let bytes = STANDARD.decode(start).map_err(|error| format!("the image is not base64: {error}"))?;
    match bytes[..] {
        [0x89, b'P', b'N', b'G', _, _, _, _, _, _, _, _, b'I', b'H', b'D', b'R', w0, w1, w2, w3, h0, h1, h2, h3] => {
            Ok((u32::from_be_bytes([w0, w1, w2, w3]), u32::from_be_bytes([h0, h1, h2, h3])))
        }
        _ => Err("the image is no PNG".into()),
    }
}

/// Refuses sizes that would take more memory or time than any picture that is worth it.
fn check_size(width: u32, height: u32) -> std::result::Result<(), String> {
    let (long, short) = (width.max(height), width.min(height));
    if long > MOST_SIDE || u64::from(width) * u64::from(height) > MOST_PIXELS {
        return Err(format!("{width} x {height} pixels; send up to {MOST_SIDE} on a side and {MOST_PIXELS} in all"));
    }
    if long > MOST_ASPECT * short {
        return Err(format!("{width} x {height} pixels; one side may be up to {MOST_ASPECT} times the other"));
    }
    Ok(())
}

/// A PNG picture, or what is wrong with it.
fn picture(base64: &str) -> std::result::Result<RgbImage, String> {
    let bytes = STANDARD.decode(base64).map_err(|error| format!("the image is not base64: {error}"))?;
    let mut reader = ImageReader::with_format(Cursor::new(bytes), ImageFormat::Png);
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MOST_SIDE), Some(MOST_SIDE));
    limits.max_alloc = Some(16 * MOST_PIXELS); // four channels of two bytes, twice
    reader.limits(limits);
    reader.decode().map(|image| image.into_rgb8()).map_err(|error| format!("the image is no PNG: {error}"))
}

/// Pictures of one size as `[B, 3, H, W]` in [0, 1].
fn images(alike: &[RgbImage]) -> Result<Tensor> {
    let (width, height) = alike[0].dimensions();
    let mut values = Vec::with_capacity(3 * alike.len() * (width * height) as usize);
    for picture in alike {
        for channel in 0..3 {
            values.extend(picture.pixels().map(|pixel| f32::from(pixel[channel]) / 255.0));
        }
    }
    Ok(Tensor::from_vec(values, (alike.len(), 3, height as usize, width as usize), &Device::Cpu)?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::reward::{RewardConfig, RewardKind, build};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A PNG file of one colour, in base64.
    pub fn flat(width: u32, height: u32) -> String {
        let mut png = Cursor::new(Vec::new());
        image::GrayImage::new(width, height).write_to(&mut png, ImageFormat::Png).unwrap();
        STANDARD.encode(png.into_inner())
    }

    /// The body of a request for the rewards of these images and their prompts.
    pub fn asking(images: &[(&str, String)], rewards: &[&str]) -> Vec<u8> {
        let one = |(prompt, image): &(&str, String)| json!({"prompt": prompt, "image_png_b64": image, "metadata": {}});
        let requests: Vec<Value> = images.iter().map(one).collect();
        json!({"requests": requests, "rewards": rewards}).to_string().into()
    }

    /// What the size of JPEG files says of a request.
    fn answered(body: &[u8]) -> std::result::Result<Value, Refusal> {
        answer(&build(&[RewardConfig::new(RewardKind::JpegIncompressibility)], 1).unwrap(), body, &|| false)
    }

    const JPEG: &str = "jpeg-incompressibility";

    /// Flat pictures compress to nothing: what they would take is known from what they say of their size.
    #[test]
    fn images_that_would_take_much_are_refused_before_they_are_decoded() {
        for ((width, height, times), status, said) in [
            ((4097, 4000, 1), 400, "image 0: 4097 x 4000 pixels; send up to 4096 on a side"),
            ((4096, 4096, 1), 400, "image 0: 4096 x 4096 pixels; send up to 4096 on a side and 4194304 in all"),
            ((4096, 1, 1), 400, "image 0: 4096 x 1 pixels; one side may be up to 16 times the other"),
            ((1, 17, 1), 400, "image 0: 1 x 17 pixels; one side"),
            ((2048, 2048, 65), 413, "272629760 pixels in all images; send up to 268435456"),
            ((8, 8, 1025), 400, "a list of more than 1024; send several requests"),
        ] {
            let image = flat(width, height);
            let refused = answered(&asking(&vec![("", image); times], &[JPEG])).unwrap_err();
            assert!(refused.0 == status && refused.1.contains(said), "{refused:?}");
        }
        for (width, height) in [(2048, 2048), (4096, 256), (1, 16)] {
            let answer = answered(&asking(&[("", flat(width, height))], &[JPEG])).unwrap();
            assert!(answer["results"][0][JPEG].is_number(), "{answer}");
        }
    }

    #[test]
    fn requests_that_ask_for_too_much_else_are_refused() {
        let image = flat(8, 8);
        for (body, said) in [
            (asking(&[(&"x".repeat(16 << 10 | 1), image.clone())], &[JPEG]), "a prompt of 16385 bytes"),
            (asking(&[("", image.clone())], &[JPEG, JPEG]), "is asked for twice"),
            (asking(&[("", image.clone())], &["beauty"]), "there is no reward \"beauty\", but jpeg"),
            (asking(&[("", image.clone())], &["x"; 65]), "a list of more than 64"),
            (
                br#"{"requests": [{"prompt": "", "image_png_b64": "", "metadata": 7}], "rewards": []}"#.to_vec(),
                "invalid",
            ),
        ] {
            let refused = answered(&body).unwrap_err();
            assert!(refused.0 == 400 && refused.1.contains(said), "{refused:?}");
        }
    }

    /// One wrong image is told by itself; the others, of other sizes or more than are decoded at a time, have their scores,
    /// which are those that they have alone.
    #[test]
    fn images_are_scored_in_their_places_whatever_stands_beside_them() {
        let broken = STANDARD.encode(&STANDARD.decode(flat(2048, 2048)).unwrap()[..40]);
        let images =
            [flat(2048, 2048), "?".repeat(40), broken, flat(64, 8), flat(2048, 2048), flat(2048, 2048), "iVBOR".into()];
        let with_prompts: Vec<(&str, String)> = images.iter().map(|image| ("", image.clone())).collect();
        let all = answered(&asking(&with_prompts, &[JPEG])).unwrap();
        for (i, said) in [(1, "not base64"), (2, "is no PNG"), (6, "too short")] {
            let error = all["errors"][i][JPEG].as_str().unwrap();
            assert!(error.contains(said) && all["results"][i] == json!({}), "{all}");
        }
        for i in [0, 3, 4, 5] {
            let alone = answered(&asking(&[("", images[i].clone())], &[JPEG])).unwrap();
            assert_eq!((&all["results"][i], &all["errors"][i]), (&alone["results"][0], &Value::Null));
            assert!(alone["results"][0][JPEG].as_f64().unwrap() > 0.0);
        }
    }

    /// Thin strips are few pixels and much work: a scorer enlarges each to the height that it reads at.
    #[test]
    fn a_client_that_goes_is_scored_for_a_few_images_more_whatever_their_size() {
        struct Counts(&'static str, Arc<AtomicUsize>);
        impl Reward for Counts {
            fn name(&self) -> &str {
                self.0
            }

            fn score(&self, images: &Tensor, _: &[Prompt]) -> Result<Vec<Option<f64>>> {
                self.1.fetch_add(images.dim(0)?, Ordering::Relaxed);
                Ok(vec![Some(1.0); images.dim(0)?])
            }
        }
        let scored = Arc::new(AtomicUsize::new(0));
        let rewards: Vec<Box<dyn Reward>> =
            ["first", "second"].map(|name| Box::new(Counts(name, scored.clone())) as Box<dyn Reward>).into();
        let body = asking(&vec![("", flat(16, 1)); 1024], &["first", "second"]);
        let asked = std::cell::Cell::new(0);
        // Gone after the first reward of the first images.
        let gone = || asked.replace(asked.get() + 1) >= 2;
        assert_eq!(answer(&rewards, &body, &gone).unwrap_err().0, StatusCode::REQUEST_TIMEOUT);
        assert_eq!(scored.load(Ordering::Relaxed), 16, "of 2048 scores");
    }
}
