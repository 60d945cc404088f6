"""Makes tests/fixtures/clip_rewards: a micro CLIP model in every form that users have, pictures, prompts, and the scores that
the rewards' own programs give them (DiffusionNFT, flow_grpo/{clip,pickscore,hpsv2,aesthetic}_scorer.py), recomputed here.

    python tests/peers/make_clip_rewards.py FIXTURES      (FIXTURES holds pickscore_micro; packages: requirements.txt)

HPS comes from open_clip's own model, which reads its tensors by their names and shapes.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, CLIPModel

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
PROMPTS = ["w5 w17 w300", "w40", "w5 w17 w300"]
# Height and width of the pictures of one call.
SIZES = {"square": (64, 64), "wide": (48, 71), "high": (67, 43), "small": (20, 24)}


def pattern(h, w, shift):
    y, x = np.mgrid[:h, :w]
    blue = ((7 * x + 13 * y + 31 * shift) ^ (x * y)) % 256
    return np.stack([x * 255 // (w - 1), (y * 255 // (h - 1) + 40 * shift) % 256, blue], -1).astype(np.uint8)


def resized(x, size, mode):
    """torchvision's Resize of tensors: antialiased, not clamped."""
    return torch.nn.functional.interpolate(x, size=size, mode=mode, antialias=True, align_corners=False)


def tensor_pixels(x, size):
    h, w = x.shape[-2:]
    to = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    x = resized(x, to, "bilinear") if to != (h, w) else x
    top, left = int(round((x.shape[2] - size) / 2.0)), int(round((x.shape[3] - size) / 2.0))
    return (x[:, :, top : top + size, left : left + size] - MEAN) / STD


def padded_pixels(x, size):
    h, w = x.shape[-2:]
    scale = size / max(h, w)
    if scale != 1.0:
        to = (round(h * scale), round(w * scale))
        x = resized(x, to, "bicubic")
        ph, pw = size - to[0], size - to[1]
        x = torch.nn.functional.pad(x, (pw // 2, pw - pw // 2, ph // 2, ph - ph // 2))
    return (x - MEAN) / STD


def open_clip_names(state):
    """By hand, tensor by tensor: what open_clip calls the same model."""
    out = {"logit_scale": state["logit_scale"]}
    for source, target in [("text_model", ""), ("vision_model", "visual.")]:
        layers = {int(k.split(".")[3]) for k in state if k.startswith(f"{source}.encoder.layers.")}
        for i in layers:
            a, b = f"{source}.encoder.layers.{i}.", f"{target}transformer.resblocks.{i}."
            for part in ["weight", "bias"]:
                out[b + "attn.in_proj_" + part] = torch.cat([state[a + f"self_attn.{p}_proj.{part}"] for p in "qkv"])
                out[b + "attn.out_proj." + part] = state[a + "self_attn.out_proj." + part]
                out[b + "ln_1." + part] = state[a + "layer_norm1." + part]
                out[b + "ln_2." + part] = state[a + "layer_norm2." + part]
                out[b + "mlp.c_fc." + part] = state[a + "mlp.fc1." + part]
                out[b + "mlp.c_proj." + part] = state[a + "mlp.fc2." + part]
    for part in ["weight", "bias"]:
        out["ln_final." + part] = state["text_model.final_layer_norm." + part]
        out["visual.ln_pre." + part] = state["vision_model.pre_layrnorm." + part]
        out["visual.ln_post." + part] = state["vision_model.post_layernorm." + part]
    out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    out["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    out["text_projection"] = state["text_projection.weight"].T.contiguous()
    out["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    return {k: v.clone() for k, v in out.items()}


def open_clip_model(config, state):
    """open_clip's model of the same sizes: it has none for micro models, so they are said here."""
    vision, text = config["vision_config"], config["text_config"]
    model = open_clip.CLIP(
        config["projection_dim"],
        open_clip.CLIPVisionCfg(
            layers=vision["num_hidden_layers"], width=vision["hidden_size"], head_width=vision["hidden_size"] // vision["num_attention_heads"],
            patch_size=vision["patch_size"], image_size=vision["image_size"],
        ),
        open_clip.CLIPTextCfg(
            context_length=text["max_position_embeddings"], vocab_size=text["vocab_size"], width=text["hidden_size"],
            heads=text["num_attention_heads"], layers=text["num_hidden_layers"],
        ),
    )
    model.load_state_dict(state)
    return model.eval()


class Predictor(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        linear, dropout = torch.nn.Linear, torch.nn.Dropout
        self.layers = torch.nn.Sequential(
            linear(width, 16), dropout(0.2), linear(16, 12), dropout(0.2), linear(12, 8), dropout(0.1), linear(8, 4), linear(4, 1)
        )

    def forward(self, x):
        return self.layers(x)


def main(fixtures):
    source, folder = fixtures / "pickscore_micro", fixtures / "clip_rewards"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "hf").mkdir(parents=True)
    torch.manual_seed(3)
    model = CLIPModel.from_pretrained(source).eval()
    config = json.loads((source / "config.json").read_text())
    size, words = config["vision_config"]["image_size"], config["text_config"]["vocab_size"]

    # A tokenizer of whole words that ends every text with the largest token, as CLIP's does.
    start, end = words - 2, words - 1
    vocabulary = {f"w{i}": i for i in range(start)} | {"<start>": start, "<end>": end}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)])
    tokenizer.save(str(folder / "hf/tokenizer.json"))
    (folder / "hf/tokenizer_config.json").write_text(json.dumps({"pad_token": "<end>"}))

    state = {k: v.detach() for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    (folder / "open_clip").mkdir()
    (folder / "open_clip/open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": {"head_width": 16}, "text_cfg": {"heads": 2}}})
    )
    renamed = open_clip_names(state)
    torch.save({"epoch": 7, "state_dict": renamed}, folder / "open_clip/model.pt")
    predictor = Predictor(config["projection_dim"]).eval()
    torch.save(predictor.state_dict(), folder / "predictor.pth")

    ids = [tokenizer.encode(p).ids for p in PROMPTS]
    longest = max(map(len, ids))
    padded = torch.tensor([i + [0] * (config["text_config"]["max_position_embeddings"] - len(i)) for i in ids])
    ids = torch.tensor([i + [end] * (longest - len(i)) for i in ids])
    # Pillow's, as in the programs' days; CLIPImageProcessor has become torchvision's, which rounds otherwise.
    pillow = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN.flatten().tolist(), image_std=STD.flatten().tolist()
    )
    arrays, scores = {}, {}
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    features = lambda x: unit(getattr(x, "pooler_output", x))
    with torch.no_grad():
        text = features(model.get_text_features(input_ids=ids))
        cosine = lambda pixels: (features(model.get_image_features(pixel_values=pixels)) * text).sum(-1)
        hps = open_clip_model(config, renamed)
        hps_text = hps.encode_text(padded, normalize=True)
        scale = model.logit_scale.exp()
        for name, (h, w) in SIZES.items():
            pictures = np.stack([pattern(h, w, i) for i in range(len(PROMPTS))])
            arrays[name] = torch.from_numpy(pictures)
            x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0
            own = pillow([Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"]
            scores[name] = {
                "clip-score": (scale * cosine(tensor_pixels(x, size)) / 100).tolist(),
                "pick-score": (scale * cosine(own) / 26).tolist(),
                "hps": (hps.encode_image(padded_pixels(x, size), normalize=True) * hps_text).sum(-1).tolist(),
                "aesthetic": predictor(features(model.get_image_features(pixel_values=own))).squeeze(1).tolist(),
            }
    save_file(arrays, folder / "pictures.safetensors")
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__, "open_clip": open_clip.__version__, "pillow": Image.__version__}
    meta = {"what": "scores of micro CLIP rewards, by their own programs' arithmetic", "prompts": PROMPTS, "scores": scores, "versions": versions}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


main(Path(sys.argv[1]))
