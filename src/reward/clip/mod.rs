//! Rewards of the CLIP family: how well text and picture agree in a model's space of features, or how a picture pleases.

mod config;

pub use config::{AestheticConfig, ClipFiles, ClipScoreConfig, HpsConfig, PickScoreConfig};

use super::preprocess::Preprocess;
use super::{Reward, check_count, to_rgb8};
use crate::data::Prompt;
use crate::error::{Error, Result};
use crate::model::clip::Clip;
use crate::model::files::AnyWeights;
use crate::model::text::{Tokenizer, uncurl};
use candle_core::{D, DType, Device, Tensor};
use image::RgbImage;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// A CLIP model with its tokenizer, loaded once for all the rewards that use it.
pub struct Backbone {
    clip: Clip,
    tokenizer: Tokenizer,
    device: Device,
}

impl Backbone {
    /// Reads the model, in f32, and the tokenizer of another folder if it has none of its own.
    ///
    /// # Errors
    /// [`Error::File`]: something is missing, damaged or of another kind.
    pub fn load(path: &Path, tokenizer: Option<&Path>, device: &Device) -> Result<Self> {
        let clip = Clip::open(path, DType::F32, device)?;
        let length = clip.config().text_config.max_position_embeddings;
        let own = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let tokenizer = Tokenizer::open(tokenizer.unwrap_or(own), length).map_err(|error| match tokenizer {
            Some(_) => error,
            None => Error::File {
                path: own.to_path_buf(),
                message: format!("{error}; or name a folder with CLIP's tokenizer with the reward's key tokenizer"),
            },
        })?;
        tokenizer.check(clip.config().text_config.vocab_size)?;
        Ok(Self { clip, tokenizer, device: device.clone() })
    }

    /// Pictures or texts that go through a tower at once. One on the CPU, where a single one keeps the cores busy and its score
    /// does not depend on others. On a GPU a number that divides the usual groups, because incomplete batches are filled up.
    fn batch(&self) -> usize {
        if self.device.is_cpu() { 1 } else { 8 }
    }

    /// Features of the pictures `[B, D]` on the CPU, of length 1.
    fn image_features(&self, pictures: &[RgbImage], preprocess: Preprocess) -> Result<Tensor> {
        let size = self.clip.config().vision_config.image_size;
        self.in_batches(pictures.len(), |places| {
            let batch: Vec<RgbImage> = places.iter().map(|&i| pictures[i].clone()).collect();
            self.clip.image_features(&preprocess.run(&batch, size)?.to_device(&self.device)?)
        })
    }

    /// Features of the prompts `[B, D]` on the CPU, of length 1; equal texts are encoded once.
    fn text_features(&self, prompts: &[Prompt]) -> Result<Tensor> {
        let (texts, rows) = distinct(prompts);
        let features = self.in_batches(texts.len(), |places| {
            let ids = places.iter().map(|&i| self.tokenizer.encode(texts[i])).collect::<Result<Vec<_>>>()?;
            self.clip.text_features(&ids)
        })?;
        Ok(features.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?)
    }

    /// The features of `count` inputs, in batches of one size; the last batch is filled up by repeating its last input.
    fn in_batches(&self, count: usize, features: impl Fn(&[usize]) -> Result<Tensor>) -> Result<Tensor> {
        let size = self.batch();
        let mut all = Vec::new();
        for start in (0..count).step_by(size) {
            let places: Vec<usize> = (start..start + size).map(|i| i.min(count - 1)).collect();
            let own = size.min(count - start);
            all.push(unit(&features(&places)?.narrow(0, 0, own)?)?);
        }
        Ok(Tensor::cat(&all, 0)?)
    }

    /// The cosine of each prompt's features and its picture's, `[B]`.
    fn cosines(&self, pictures: &[RgbImage], prompts: &[Prompt], preprocess: Preprocess) -> Result<Vec<f64>> {
        cosines(&self.image_features(pictures, preprocess)?, &self.text_features(prompts)?)
    }
}

/// The different texts of the prompts, and for each prompt the place of its text among them, `[B]`.
fn distinct(prompts: &[Prompt]) -> (Vec<&str>, Vec<u32>) {
    let mut places: HashMap<&str, u32> = HashMap::new();
    let mut texts: Vec<&str> = Vec::new();
    let mut rows = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        rows.push(*places.entry(&*prompt.text).or_insert_with(|| {
            texts.push(&*prompt.text);
            texts.len() as u32 - 1
        }));
    }
    (texts, rows)
}

/// Features `[B, D]` on the CPU, each row of length 1.
fn unit(features: &Tensor) -> Result<Tensor> {
    let features = features.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(features.broadcast_div(&features.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}

/// The products of rows of length 1, `[B]`.
fn cosines(images: &Tensor, texts: &Tensor) -> Result<Vec<f64>> {
    Ok((images * texts)?.sum(1)?.to_dtype(DType::F64)?.to_vec1()?)
}

/// How picture and prompt are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alignment {
    /// `logits_per_image / 100` of openai/clip-vit-large-patch14 (flow_grpo/clip_scorer.py): the cosine.
    ClipScore,
    /// `exp(logit_scale) cos / 26` of yuvalkirstain/PickScore_v1 (flow_grpo/pickscore_scorer.py); papers quote it times
    /// 26.
    PickScore,
    /// The cosine in HPS v2.1's ViT-H-14 (DiffusionNFT, flow_grpo/hpsv2_scorer.py).
    Hps,
}

impl Alignment {
    fn preprocess(self) -> Preprocess {
        match self {
            Alignment::ClipScore => Preprocess::Tensor,
            Alignment::PickScore => Preprocess::Pillow,
            Alignment::Hps => Preprocess::Padded,
        }
    }

    /// The prompts as the program words them for its tokenizer.
    fn worded(self, prompts: &[Prompt]) -> Cow<'_, [Prompt]> {
        match self {
            Alignment::ClipScore | Alignment::PickScore => Cow::Borrowed(prompts),
            Alignment::Hps => {
                let cleaned = |prompt: &Prompt| Prompt { text: uncurl(&prompt.text).into(), ..prompt.clone() };
                Cow::Owned(prompts.iter().map(cleaned).collect())
            }
        }
    }

    /// What the cosine is multiplied by.
    fn scale(self, logit_scale: f64) -> f64 {
        match self {
            Alignment::ClipScore => logit_scale.exp() / 100.0,
            Alignment::PickScore => logit_scale.exp() / 26.0,
            Alignment::Hps => 1.0,
        }
    }
}

/// A model that rewards pictures which agree with their prompt.
pub struct ClipReward {
    /// What is computed.
    pub alignment: Alignment,
    /// With which model.
    pub backbone: Arc<Backbone>,
}

impl Reward for ClipReward {
    fn name(&self) -> &str {
        match self.alignment {
            Alignment::ClipScore => "clip-score",
            Alignment::PickScore => "pick-score",
            Alignment::Hps => "hps",
        }
    }

    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let pictures = to_rgb8(images)?;
        check_count(self.name(), pictures.len(), prompts)?;
        let scale = self.alignment.scale(self.backbone.clip.logit_scale());
        let prompts = self.alignment.worded(prompts);
        let cosines = self.backbone.cosines(&pictures, &prompts, self.alignment.preprocess())?;
        Ok(cosines.into_iter().map(|cosine| Some(scale * cosine)).collect())
    }

    fn scalings(&self) -> &[(&str, f64)] {
        match self.alignment {
            Alignment::PickScore => &[("raw", 26.0)],
            _ => &[],
        }
    }
}

/// The layers of the aesthetic predictor; dropout stands between them, and nothing else.
const LAYERS: [&str; 5] = ["layers.0", "layers.2", "layers.4", "layers.6", "layers.7"];

/// LAION's aesthetic predictor on the features of CLIP ViT-L/14, roughly 1 to 10 (flow_grpo/aesthetic_scorer.py,
/// christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE.pth`).
pub struct Aesthetic {
    backbone: Arc<Backbone>,
    /// Weight `[out, in]` and bias `[out]` of each layer.
    layers: Vec<(Tensor, Tensor)>,
}

impl Aesthetic {
    /// Reads the predictor, a file of `torch.save` or safetensors.
    ///
    /// # Errors
    /// [`Error::File`]: it is missing, damaged, or its layers do not fit the model.
    pub fn load(predictor: &Path, backbone: Arc<Backbone>) -> Result<Self> {
        let weights = AnyWeights::open(predictor)?;
        let mut width = backbone.clip.config().projection_dim;
        let mut layers = Vec::new();
        for name in LAYERS {
            let [weight, bias] =
                ["weight", "bias"].map(|part| weights.tensor(&format!("{name}.{part}"), DType::F32, &Device::Cpu));
            let (weight, bias) = (weight?, bias?);
            let fits = weight.dims2().is_ok_and(|(out, from)| from == width && bias.dims() == [out]);
            if !fits {
                let message = format!(
                    "{name} has shape {:?} behind {width} features; is it the predictor of this CLIP model?",
                    weight.dims()
                );
                return Err(weights.error(message));
            }
            width = bias.dim(0)?;
            layers.push((weight, bias));
        }
        if width != 1 {
            return Err(weights.error(format!("ends in {width} numbers, not in one score")));
        }
        Ok(Self { backbone, layers })
    }
}

impl Reward for Aesthetic {
    fn name(&self) -> &str {
        "aesthetic"
    }

    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<Option<f64>>> {
        let pictures = to_rgb8(images)?;
        check_count(self.name(), pictures.len(), prompts)?;
        let features = self.backbone.image_features(&pictures, Preprocess::Pillow)?;
        // Picture by picture, so that a score depends on nothing else.
        let score = |i: usize| -> Result<Option<f64>> {
            let mut x = features.narrow(0, i, 1)?;
            for (weight, bias) in &self.layers {
                x = x.matmul(&weight.t()?)?.broadcast_add(bias)?;
            }
            Ok(Some(f64::from(x.flatten_all()?.get(0)?.to_scalar::<f32>()?)))
        };
        (0..pictures.len()).map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::PromptSet;
    use std::path::PathBuf;

    fn fixture(name: &str) -> PathBuf {
        std::env::var_os("FLOWRL_FIXTURES")
            .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from)
            .join(name)
    }

    /// A group's prompt goes through the tower of texts once, and its features are those that it has alone, to the bit.
    #[test]
    fn equal_prompts_are_encoded_once() -> Result<()> {
        let texts = ["a cat", "a cat", "a dog", "a cat", "a dog"].map(String::from);
        let prompts = texts.into_iter().collect::<PromptSet>().prompts;
        assert_eq!(distinct(&prompts), (vec!["a cat", "a dog"], vec![0, 0, 1, 0, 1]));
        let (model, tokenizer) = (fixture("pickscore_micro"), fixture("clip_rewards/hf"));
        let backbone = Backbone::load(&model, Some(&tokenizer), &Device::Cpu)?;
        let together = backbone.text_features(&prompts)?.to_vec2::<f32>()?;
        for (prompt, features) in prompts.iter().zip(together) {
            assert_eq!(backbone.text_features(std::slice::from_ref(prompt))?.to_vec2::<f32>()?, [features]);
        }
        Ok(())
    }

    /// HPS goes through open_clip, which cleans its prompts; the others through transformers, which does not.
    #[test]
    fn the_prompts_of_hps_have_plain_quotes() {
        let texts = ["a sign, \u{201c}OPEN\u{201d}", "it\u{2019}s"].map(String::from);
        let prompts = texts.clone().into_iter().collect::<PromptSet>().prompts;
        let worded =
            |alignment: Alignment| alignment.worded(&prompts).iter().map(|p| p.text.to_string()).collect::<Vec<_>>();
        assert_eq!(worded(Alignment::Hps), ["a sign, \"OPEN\"", "it's"]);
        assert_eq!((worded(Alignment::PickScore), worded(Alignment::ClipScore)), (texts.to_vec(), texts.to_vec()));
    }

    /// tests/fixtures/pickscore_micro: transformers' `CLIPModel`, scored as PickScore's program does.
    #[test]
    fn parity_of_pick_score_with_transformers() -> Result<()> {
        let folder = fixture("pickscore_micro");
        let io = candle_core::safetensors::load(folder.join("io.safetensors"), &Device::Cpu)?;
        let clip = Clip::open(&folder, DType::F32, &Device::Cpu)?;
        let ids = io["in.input_ids"].to_dtype(DType::U32)?.to_vec2()?;
        let images = unit(&clip.image_features(&io["in.pixel_values"])?)?;
        let cosines = cosines(&images, &unit(&clip.text_features(&ids)?)?)?;
        let scale = Alignment::PickScore.scale(clip.logit_scale());
        for (name, factor) in [("out.pickscore_over_26", scale), ("out.pickscore", 26.0 * scale)] {
            let recorded = io[name].to_dtype(DType::F64)?.to_vec1::<f64>()?;
            for (cosine, recorded) in cosines.iter().zip(recorded) {
                println!("{name}: {} and {recorded}", factor * cosine);
                assert!((factor * cosine - recorded).abs() < 1e-4, "{name}: {}, not {recorded}", factor * cosine);
            }
        }
        Ok(())
    }
}
