"""launch/peers computes what it says: recorded values of diffusers' transformer and decoder with random weights, of
DiffusionNFT's solver and of its loss (tests/fixtures)."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

root = Path(__file__).parents[2]
sys.path.insert(0, str(root / "launch/peers"))

from diffusion_nft import dpm2, objective, sigmas  # noqa: E402
from model import MEDIUM, Decoder, Size, Transformer  # noqa: E402

fixtures = root / "tests/fixtures"

BLOCK = {
    "image_modulation": "norm1.linear", "text_modulation": "norm1_context.linear",
    "image.q": "attn.to_q", "image.k": "attn.to_k", "image.v": "attn.to_v",
    "image.norm_q": "attn.norm_q", "image.norm_k": "attn.norm_k", "image_out": "attn.to_out.0",
    "text.q": "attn.add_q_proj", "text.k": "attn.add_k_proj", "text.v": "attn.add_v_proj",
    "text.norm_q": "attn.norm_added_q", "text.norm_k": "attn.norm_added_k", "text_out": "attn.to_add_out",
    "second.q": "attn2.to_q", "second.k": "attn2.to_k", "second.v": "attn2.to_v",
    "second.norm_q": "attn2.norm_q", "second.norm_k": "attn2.norm_k", "second_out": "attn2.to_out.0",
    "image_mlp.0": "ff.net.0.proj", "image_mlp.2": "ff.net.2",
    "text_mlp.0": "ff_context.net.0.proj", "text_mlp.2": "ff_context.net.2",
}  # fmt: skip
TRANSFORMER = {
    "patch": "pos_embed.proj", "context": "context_embedder", "modulation": "norm_out.linear", "out": "proj_out",
    "time.0": "time_text_embed.timestep_embedder.linear_1", "time.2": "time_text_embed.timestep_embedder.linear_2",
    "pooled.0": "time_text_embed.text_embedder.linear_1", "pooled.2": "time_text_embed.text_embedder.linear_2",
}  # fmt: skip


def close(what, value, expected, tolerance):
    off = float((value - expected).abs().max() / expected.abs().max())
    assert off < tolerance, f"{what}: {off:.1e} off"
    print(f"{what}: {off:.1e} off at most, of the largest value")


def transformer():
    folder = fixtures / "sd3_micro"
    config = json.loads((folder / "config.json").read_text())
    given = load_file(folder / "diffusion_pytorch_model.safetensors")
    width, side = config["caption_projection_dim"], config["sample_size"] // 2
    size = Size(width, config["num_attention_heads"], config["num_layers"], len(config["dual_attention_layers"]),
                config["sample_size"], config["joint_attention_dim"], config["pooled_projection_dim"])  # fmt: skip
    names = dict(TRANSFORMER)
    for block in range(size.depth):
        names |= {f"blocks.{block}.{ours}": f"transformer_blocks.{block}.{theirs}" for ours, theirs in BLOCK.items()}
    whole = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")}
    weights = {ours: given.pop(theirs) for ours, theirs in whole.items() if theirs in given}
    most = config["pos_embed_max_size"]
    first = (most - side) // 2
    grid = given.pop("pos_embed.pos_embed").reshape(most, most, width)[first : first + side, first : first + side]
    assert not given, f"not taken over: {list(given)}"
    model = Transformer(size)
    model.load_state_dict(weights | {"positions": grid.reshape(1, side * side, width)})
    return model


def decoder():
    folder = fixtures / "vae_micro"
    config = json.loads((folder / "config.json").read_text())
    channels = tuple(reversed(config["block_out_channels"]))
    size = Size(channels=channels, layers=config["layers_per_block"] + 1, groups=config["norm_num_groups"])
    model = Decoder(size)
    # Both lists go from the latent to the picture; in diffusers' files a block's parts are in another order.
    given = load_file(folder / "diffusion_pytorch_model.safetensors")
    resnet = {"first.0": "norm1", "first.2": "conv1", "then.0": "norm2", "then.2": "conv2", "beside": "conv_shortcut"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    parts = ["conv_in", "mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    for block in range(len(channels)):
        parts += [f"up_blocks.{block}.resnets.{layer}" for layer in range(size.layers)]
        if block + 1 < len(channels):
            parts += ["", f"up_blocks.{block}.upsamplers.0.conv"]
    parts += ["conv_norm_out", "", "conv_out"]
    assert len(parts) == len(model)
    weights = {}
    for name in model.state_dict():
        index, _, rest = name.partition(".")
        rest, _, kind = rest.rpartition(".")
        inner = {**resnet, **attention}.get(rest, rest)
        weights[name] = given.pop(".".join(filter(None, ("decoder", parts[int(index)], inner, kind))))
    assert not [name for name in given if name.startswith("decoder.")]
    model.load_state_dict(weights)
    return model


def sizes():
    """Those of Stable Diffusion 3.5 Medium, and of DiffusionNFT's adapters."""
    with torch.device("meta"):
        model, pictures = Transformer(MEDIUM, ("policy",)), Decoder(MEDIUM)
    adapters = {name: p.numel() for name, p in model.named_parameters() if ".adapters." in name}
    assert (len(adapters), sum(adapters.values())) == (2 * 191, 18_776_064)
    assert sum(p.numel() for p in model.parameters()) - sum(adapters.values()) == 2_243_171_520
    assert sum(p.numel() for p in pictures.parameters()) == 49_545_475


@torch.no_grad()
def main():
    sizes()
    model = transformer()
    io = load_file(fixtures / "sd3_micro/io.safetensors")
    t = io["in.timestep"] / 1000
    conditioning = io["in.encoder_hidden_states"], io["in.pooled"]
    v = model(io["in.xt"], t, *conditioning)
    close("transformer", v, io["out.v"], 1e-5)

    x0, advantage = io["in.x0"], io["in.advantage"]
    loss = objective(v, io["in.v_old"], io["in.v_ref"], io["in.xt"], x0, t, advantage, kl=1e-2)
    expected = json.loads((fixtures / "sd3_micro/meta.json").read_text())["loss"]
    close("loss", loss, torch.tensor(expected["nft_beta1_kl"]), 1e-5)
    loss = objective(v, io["in.v_old"], io["in.v_ref"], io["in.xt"], x0, t, advantage, mix=0.1, kl=0.0)
    close("loss, mix 0.1", loss, torch.tensor(expected["nft_beta0.1"]), 1e-5)

    solved = load_file(fixtures / "solvers/io.safetensors")
    x0 = dpm2(lambda z, t: model(z, t, *conditioning), io["in.noise"], sigmas(10))
    close("dpm2", x0, solved["out.micro.dpm2.10.trunc"], 1e-5)

    io = load_file(fixtures / "vae_micro/io.safetensors")
    model = decoder()
    close("decoder", model(io["in.latent"] / 1.5305 + 0.0609), io["out.decoded"], 1e-5)


main()
