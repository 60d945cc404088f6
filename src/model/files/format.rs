//! The layouts that files of a model come in.

/// The models that are part of the program: a tensor that no other has, and what they are called.
pub(super) const EMBEDDED: [(&str, &str); 2] =
    [("context_embedder.characters", GLYPHS), ("context_embedder.words", SHAPES)];

/// The model of the task of glyphs.
pub const GLYPHS: &str = "glyphs base model";
/// The model of the task of shapes.
pub const SHAPES: &str = "shapes base model";

/// The layouts that files of a model come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A folder with `model_index.json` and a folder for every part.
    Pipeline,
    /// Weights by diffusers' names of the transformer alone, with or without its `config.json`.
    Transformer,
    /// The authors' single file, with or without the VAE.
    SingleFile,
    /// Weights of a model that is part of the program, by its name in the list of this file.
    Embedded(&'static str),
    /// An adapter of PEFT: `adapter_config.json` and `adapter_model.safetensors`.
    PeftAdapter,
    /// An adapter of diffusers: `pytorch_lora_weights.safetensors`.
    DiffusersAdapter,
    /// An adapter with kohya's names, `lora_unet_...`.
    KohyaAdapter,
    /// An adapter with ComfyUI's names, `diffusion_model...`.
    ComfyAdapter,
}

impl Format {
    /// The layout in a few words.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Pipeline => "diffusers pipeline",
            Self::Transformer => "diffusers transformer",
            Self::SingleFile => "single file by its authors' names",
            Self::Embedded(model) => model,
            Self::PeftAdapter => "PEFT adapter",
            Self::DiffusersAdapter => "diffusers LoRA",
            Self::KohyaAdapter => "kohya LoRA",
            Self::ComfyAdapter => "LoRA with ComfyUI's names",
        }
    }
}
