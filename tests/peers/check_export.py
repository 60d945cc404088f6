"""Reads our exports of the small transformer with diffusers and PEFT and compares the velocities with ours.

    python check_export.py FOLDER        the folder that `cargo test --test parity files::peers` writes
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate
import diffusers
import peft
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

for package in (diffusers, transformers):
    package.utils.logging.set_verbosity_error()

TOLERANCE = 1e-4  # absolute, of velocities of about 2

folder = sys.argv[1]
io = load_file(f"{folder}/io.safetensors")
failed = False


def report(name, error, limit):
    global failed
    bad = not error <= limit
    failed |= bad
    print(f"{name:<44} {error:9.2e}   {'FAILED' if bad else 'ok'}")


def model(name):
    return SD3Transformer2DModel.from_pretrained(f"{folder}/{name}", subfolder="transformer").eval()


def compare(name, transformer, ours, io=io):
    with torch.no_grad():
        velocity = transformer(
            hidden_states=io["in.xt"],
            timestep=io["in.timestep"],
            encoder_hidden_states=io["in.encoder_hidden_states"],
            pooled_projections=io["in.pooled"],
            return_dict=False,
        )[0]
    report(name, (velocity - io[f"ours.{ours}"]).abs().max().item(), TOLERANCE)


def pipeline():
    absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=model("base"), scheduler=scheduler, **dict.fromkeys(absent))


def compare_files(name, theirs, ours):
    """Largest difference of two sets of tensors; infinite if the names or shapes differ."""
    if theirs.keys() != ours.keys():
        print("only one has", sorted(theirs.keys() ^ ours.keys())[:10])
        return report(name, float("inf"), 0)
    same = all(theirs[key].shape == ours[key].shape for key in ours)
    report(name, max((theirs[key] - ours[key]).abs().max().item() for key in ours) if same else float("inf"), 0)


packages = (torch, diffusers, peft, transformers, accelerate)
print("  ".join(f"{package.__name__} {package.__version__}" for package in packages))

compare("the base model", model("base"), "base")
loaded = pipeline()
loaded.load_lora_weights(f"{folder}/diffusers", weight_name="pytorch_lora_weights.safetensors")
compare("export diffusers: load_lora_weights", loaded.transformer, "adapted")
loaded.fuse_lora()
compare("export diffusers: fuse_lora", loaded.transformer, "adapted")
adapted = peft.PeftModel.from_pretrained(model("base"), f"{folder}/peft")
compare("export peft: PeftModel.from_pretrained", adapted, "adapted")
compare("export peft: merge_and_unload", adapted.merge_and_unload(), "adapted")
compare("export merged: from_pretrained", model("merged"), "adapted")
compare("export merged, in shards", model("merged_shards"), "adapted")
compare("export merged of a full fine-tune", model("merged_full"), "full")

# A whole pipeline: its transformer is ours, and its other parts make a picture of a prompt.
whole = StableDiffusion3Pipeline.from_pretrained(f"{folder}/pipeline")
whole.set_progress_bar_config(disable=True)
compare("export merged, a whole pipeline", whole.transformer, "velocity", load_file(f"{folder}/pipeline_io.safetensors"))
picture = whole("a red boat", height=64, width=64, num_inference_steps=2, output_type="np").images[0]
report("export merged, a whole pipeline: a picture", 0.0 if picture.shape == (64, 64, 3) and picture.std() > 0 else 1.0, 0)

# Our reading of the authors' single file, against diffusers' own conversion.
theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(load_file(f"{folder}/single_file.safetensors"))
ours = load_file(f"{folder}/base/transformer/diffusion_pytorch_model.safetensors")
compare_files("single file: diffusers' transformer", theirs, ours)
levels = ["DownEncoderBlock2D"] * 4
theirs = single_file_utils.convert_ldm_vae_checkpoint(
    load_file(f"{folder}/vae_single_file.safetensors"), {"down_block_types": levels, "up_block_types": levels}
)
compare_files("single file: diffusers' VAE", theirs, load_file(f"{folder}/vae.safetensors"))

sys.exit(failed)
