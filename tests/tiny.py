"""A text-to-image model small enough for tests, with every parameter random, ours and diffusers'."""

from parity import randomise
from sd_nb.interop import Parts, Sampling
from sd_nb.model.autoencoder import Autoencoder, AutoencoderConfig
from sd_nb.model.clip import TextEncoder, TextEncoderConfig
from sd_nb.model.tokenizer import Tokenizer
from sd_nb.model.unet import UNet, UNetConfig

CAPTIONS = ["a red apple", "a blue heart", "the face of a smiling cat", "green apples and red hearts",
            "a cat on the moon"]
UNET = UNetConfig(width=16, mults=(1, 2), attn=(False, True), blocks=1, heads=2, d_context=24, groups=8)
AUTOENCODER = AutoencoderConfig(width=16, mults=(1, 2), blocks=1, groups=8, scale=0.5)
TEXT = TextEncoderConfig(vocab=600, window=16, width=24, layers=2, heads=2)


def tiny_parts(unet=UNET, autoencoder=AUTOENCODER, text=TEXT, **sampling):
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=text.vocab, window=text.window)
    networks = [randomise(n, seed) for seed, n in enumerate((UNet(unet), Autoencoder(autoencoder), TextEncoder(text)))]
    return Parts(*networks, tokenizer, Sampling(size=16, **sampling))


def diffusers_pipeline(directory, **scheduler):
    """A small pipeline that diffusers made by itself, saved by diffusers."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    tiny_parts().tokenizer.save_pretrained(directory)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=2, cross_attention_dim=24,
        attention_head_dim=[2, 4], down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8, use_linear_projection=True)
    vae = AutoencoderKL(block_out_channels=(16, 16, 32), down_block_types=["DownEncoderBlock2D"] * 3, latent_channels=4,
                        up_block_types=["UpDecoderBlock2D"] * 3, norm_num_groups=4, scaling_factor=0.7)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=600, hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
        hidden_act="gelu", max_position_embeddings=16, projection_dim=24,
        bos_token_id=598, eos_token_id=599, pad_token_id=599))
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for seed, net in enumerate((unet, vae, text)): randomise(net, seed)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(directory), unet=unet, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
        scheduler=DDIMScheduler(**betas, **{"clip_sample": False, "steps_offset": 1} | scheduler))
    pipe.save_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe
