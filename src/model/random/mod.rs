//! A folder with a Stable Diffusion 3.5 of random weights, as diffusers would write it: to try a machine, a queue or a
//! configuration before the real files are there. Its pictures mean nothing.

mod sizes;
mod tokenizers;

pub use sizes::Size;

use super::text::T5Encoder;
use super::{clip, mmdit, vae};
use crate::error::{Error, Result};
use crate::params::{Init, Role, Spec};
use candle_core::{DType, Device};
use safetensors::View;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// How far the writing of a part's weights is.
pub struct Written<'a> {
    /// The part, as its folder is called.
    pub part: &'a str,
    /// Bytes drawn so far.
    pub bytes: u64,
    /// Bytes in all.
    pub of: u64,
}

/// Writes a model of this size into the folder `out`, which must not be there yet; the same seed gives the same files.
/// `on_written` is told after each tensor.
///
/// # Errors
/// [`Error::Usage`] if the folder is there, [`Error::Io`] if it cannot be written.
pub fn write(size: Size, seed: u64, out: &Path, on_written: &dyn Fn(Written)) -> Result<()> {
    if out.exists() {
        return Err(Error::Usage(format!("{}: is there already; name a new folder, or delete it", out.display())));
    }
    let configs = size.configs();
    let folder = |name: &str| out.join(name);
    let draw = &Draw { dtype: size.dtype(), seed, on_written };

    let config = mmdit::Config::parse(&configs.transformer.to_string()).map_err(Error::Failed)?;
    let model = mmdit::model(&config, (config.patch_size, config.patch_size), None)?;
    let specs: Vec<&Spec> = model.specs().into_iter().flatten().filter(|spec| spec.role != Role::Adapter).collect();
    let file = "diffusion_pytorch_model.safetensors";
    part(&folder("transformer"), &configs.transformer, (file, &specs), draw)?;

    let specs = vae::specs(&vae::Config::parse(&configs.vae.to_string()).map_err(Error::Failed)?);
    part(&folder("vae"), &configs.vae, (file, &specs.iter().collect::<Vec<_>>()), draw)?;

    let encoders = [("text_encoder", configs.clip_l), ("text_encoder_2", configs.clip_g)];
    for ((name, config), pad) in encoders.into_iter().zip(tokenizers::CLIP_PADS) {
        let specs = clip::TextEncoder::specs(&typed(&config)?);
        let files = ("model.safetensors", &*specs.iter().collect::<Vec<_>>());
        part(&folder(name), &config, files, draw)?;
        tokenizers::clip(&folder(&name.replace("text_encoder", "tokenizer")), pad, size.clip_vocabulary())?;
    }
    let specs = T5Encoder::specs(&typed(&configs.t5)?);
    let files = ("model.safetensors", &*specs.iter().collect::<Vec<_>>());
    part(&folder("text_encoder_3"), &configs.t5, files, draw)?;
    tokenizers::t5(&folder("tokenizer_3"))?;
    let scheduler =
        json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0});
    write_json(&folder("scheduler"), "scheduler_config.json", &scheduler)?;
    write_json(out, "model_index.json", &index())
}

/// What is the same for all parts.
struct Draw<'a> {
    dtype: DType,
    seed: u64,
    on_written: &'a dyn Fn(Written),
}

/// A part's config.json and weights.
fn part(folder: &Path, config: &Value, (file, specs): (&str, &[&Spec]), draw: &Draw) -> Result<()> {
    write_json(folder, "config.json", config)?;
    let failed = RefCell::new(None);
    let elements: usize = specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let progress = PartProgress { name: &name, of: elements * draw.dtype.size_in_bytes(), bytes: Cell::new(0) };
    let drawn = |spec: &Spec| Drawn { spec: visible(spec), draw, progress: &progress, failed: &failed };
    let path = folder.join(file);
    safetensors::serialize_to_file(specs.iter().map(|spec| (spec.name.as_str(), drawn(spec))), None, &path).map_err(
        |e| Error::File { path: path.clone(), message: format!("cannot be written: {e}; is the disk full?") },
    )?;
    match failed.into_inner() {
        None => {
            // The file was made for its owner alone; the folder has what the umask leaves of all permissions.
            let mode = fs::metadata(folder).map_err(Error::io(folder))?.permissions().mode() & 0o666;
            fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(Error::io(&path))
        }
        Some(error) => {
            fs::remove_file(&path).map_err(Error::io(&path))?;
            Err(error)
        }
    }
}

/// What training starts from as zeros would keep the velocity at zero; weights of layers get small random values instead.
fn visible(spec: &Spec) -> Spec {
    let init = match spec.init {
        Init::Zeros if spec.shape.len() > 1 => Init::Normal(0.02),
        init => init,
    };
    Spec { init, ..spec.clone() }
}

/// A tensor that is drawn when it is written, so that one at a time is in memory.
struct Drawn<'a> {
    spec: Spec,
    draw: &'a Draw<'a>,
    progress: &'a PartProgress<'a>,
    /// What went wrong: the trait that writes tensors knows of no errors.
    failed: &'a RefCell<Option<Error>>,
}

impl View for Drawn<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        match self.draw.dtype {
            DType::BF16 => safetensors::Dtype::BF16,
            _ => safetensors::Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.spec.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let Draw { dtype, seed, on_written } = *self.draw;
        let tensor = self.spec.initial(seed, &Device::Cpu).and_then(|t| Ok(t.to_dtype(dtype)?));
        let PartProgress { name, of, bytes } = self.progress;
        bytes.set(bytes.get() + self.data_len());
        on_written(Written { part: name, bytes: bytes.get() as u64, of: *of as u64 });
        match tensor {
            Ok(tensor) => Cow::Owned(tensor.data().into_owned()),
            Err(error) => {
                self.failed.borrow_mut().get_or_insert(error);
                Cow::Owned(Vec::new())
            }
        }
    }

    fn data_len(&self) -> usize {
        self.spec.shape.iter().product::<usize>() * self.draw.dtype.size_in_bytes()
    }
}

/// How far a part is.
struct PartProgress<'a> {
    name: &'a str,
    of: usize,
    bytes: Cell<usize>,
}

fn index() -> Value {
    json!({
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    })
}

fn typed<T: serde::de::DeserializeOwned>(config: &Value) -> Result<T> {
    serde_json::from_value(config.clone()).map_err(|e| Error::Failed(format!("a size that is none: {e}")))
}

fn write_json(folder: &Path, name: &str, value: &Value) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let path = folder.join(name);
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Failed(format!("no JSON: {e}")))?;
    fs::write(&path, text).map_err(Error::io(&path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_that_cannot_be_drawn_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let no_square =
            Spec { name: "positions".into(), shape: vec![1, 7, 8], init: Init::Grid { base: 4 }, role: Role::Buffer };
        let draw = Draw { dtype: DType::F32, seed: 1, on_written: &|_| {} };
        let error = part(folder.path(), &json!({}), ("weights.safetensors", &[&no_square]), &draw).unwrap_err();
        assert!(error.to_string().contains("[1, 7, 8]"), "{error}");
        assert!(!folder.path().join("weights.safetensors").exists());
    }
}
