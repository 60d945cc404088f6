//! Prompts to embeddings against recorded values of transformers and diffusers (tests/fixtures: each folder's meta.json
//! says how it was made). FLOWRL_FIXTURES names another folder of the same form.
//!
//! `cargo test --release --test parity text_encoders:: -- --nocapture` prints the errors.

use candle_core::{DType, Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::model::clip::{Clip, TextEncoder};
use flowrl_dist::model::text::{Embeddings, T5Encoder};
use std::collections::HashMap;
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join(name)
}

/// Recorded inputs and outputs.
struct Recorded(HashMap<String, Tensor>);

impl Recorded {
    fn of(name: &str) -> Self {
        let path = fixture(name).join("io.safetensors");
        Self(candle_core::safetensors::load(path, &Device::Cpu).expect("the fixture"))
    }

    fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("the fixture has no {name}"))
    }

    fn ids(&self, name: &str) -> Vec<Vec<u32>> {
        self.get(name).to_dtype(DType::U32).and_then(|ids| ids.to_vec2()).expect("tokens")
    }

    /// Fails where the difference is larger than `bound` times the largest recorded value.
    fn check(&self, name: &str, ours: &Tensor, bound: f64) {
        let recorded = self.get(name);
        assert_eq!(ours.dims(), recorded.dims(), "{name}");
        let largest = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>().map(f64::from);
        let difference = (ours.to_dtype(DType::F32).expect("f32") - recorded).expect("one shape");
        let error = largest(&difference).expect("numbers") / largest(recorded).expect("numbers");
        eprintln!("{name}: {error:.1e}");
        assert!(error <= bound, "{name}: {error:.1e}");
    }
}

fn check_clip_text(name: &str, dtype: DType, bound: f64) -> Result<()> {
    let recorded = Recorded::of(name);
    let encoder = TextEncoder::load(&fixture(name), dtype, &Device::Cpu)?;
    let output = encoder.forward(&recorded.ids("in.input_ids"))?;
    // transformers' last hidden state of the list is, unlike T5's, the one before the final norm.
    for (i, hidden) in output.hidden.iter().enumerate() {
        recorded.check(&format!("out.hidden.{i}"), hidden, bound);
    }
    recorded.check("out.penultimate", output.penultimate(), bound);
    recorded.check("out.last_hidden_state", &output.last, bound);
    recorded.check("out.text_embeds", &output.features, bound);
    Ok(())
}

#[test]
fn parity_of_clip_text_with_transformers() -> Result<()> {
    check_clip_text("clip_l_micro", DType::F32, 1e-5)?;
    check_clip_text("clip_g_micro", DType::F32, 1e-5)
}

#[test]
fn parity_of_clip_text_in_bf16_with_transformers() -> Result<()> {
    check_clip_text("clip_l_micro", DType::BF16, 3e-2)?;
    check_clip_text("clip_g_micro", DType::BF16, 3e-2)
}

fn check_t5(dtype: DType, bound: f64) -> Result<()> {
    let recorded = Recorded::of("t5_micro");
    let encoder = T5Encoder::load(&fixture("t5_micro"), dtype, &Device::Cpu)?;
    let output = encoder.forward(&recorded.ids("in.ids"))?;
    // transformers' last hidden state of the list is, unlike CLIP's, the one after the final norm.
    let hidden = output.hidden[..output.hidden.len() - 1].iter().chain([&output.last]);
    for (i, hidden) in hidden.enumerate() {
        recorded.check(&format!("out.hidden.{i}"), hidden, bound);
    }
    recorded.check("out.last", &output.last, bound);
    recorded.check("out.last_long", &encoder.forward(&recorded.ids("in.ids_long"))?.last, bound);
    Ok(())
}

#[test]
fn parity_of_t5_with_transformers() -> Result<()> {
    check_t5(DType::F32, 1e-5)
}

#[test]
fn parity_of_t5_in_bf16_with_transformers() -> Result<()> {
    check_t5(DType::BF16, 5e-2)
}

#[test]
fn parity_of_the_joined_embeddings_with_diffusers() -> Result<()> {
    let recorded = Recorded::of("prompt_embeds");
    let part = |name: &str| recorded.get(name);
    let clip = [(part("in.clip_l"), part("in.pooled_l")), (part("in.clip_g"), part("in.pooled_g"))];
    let joined = Embeddings::join(clip, part("in.t5"))?;
    recorded.check("out.prompt_embeds", &joined.context, 0.0);
    recorded.check("out.pooled", &joined.pooled, 0.0);
    Ok(())
}

#[test]
fn parity_of_clip_features_with_transformers() -> Result<()> {
    let recorded = Recorded::of("pickscore_micro");
    let clip = Clip::load(&fixture("pickscore_micro"), DType::F32, &Device::Cpu)?;
    let text = clip.text_features(&recorded.ids("in.input_ids"))?;
    let image = clip.image_features(recorded.get("in.pixel_values"))?;
    recorded.check("out.text_features", &text, 1e-5);
    recorded.check("out.image_features", &image, 1e-5);
    let unit = |x: &Tensor| x.broadcast_div(&x.sqr()?.sum_keepdim(1)?.sqrt()?);
    let logits = (unit(&text)?.matmul(&unit(&image)?.t()?)? * clip.logit_scale().exp())?;
    recorded.check("out.logits_per_text", &logits, 1e-5);
    Ok(())
}
