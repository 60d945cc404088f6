//! The maths, the models, the rewards and the files, against other programs and closed forms.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test ends where something is wrong")]

#[path = "../common/clip_rewards.rs"]
mod recorded;

mod closed_form;
mod files;
mod flow;
mod glyphs;
mod mixture;
mod mixture_sampler;
mod mmdit;
mod ocr;
mod reward_clip;
mod reward_geneval;
mod reward_jpeg;
mod reward_preprocess;
mod reward_prompts;
mod ring;
mod shapes;
mod text;
mod text_encoders;
mod vae;
