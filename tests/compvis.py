"""The modules of Stable Diffusion's first code as far as they give names and shapes, built in its order: an independent source of names."""

import torch
from torch import nn


def conv(i, o, k=3): return nn.Conv2d(i, o, k)


def holder(**parts):
    module = nn.Module()
    for name, part in parts.items(): module.add_module(name, part)
    return module


def resblock(i, o, d_time):
    parts = dict(in_layers=nn.Sequential(nn.GroupNorm(1, i), nn.SiLU(), conv(i, o)), emb_layers=nn.Sequential(nn.SiLU(), nn.Linear(d_time, o)),
                 out_layers=nn.Sequential(nn.GroupNorm(1, o), nn.SiLU(), nn.Dropout(), conv(o, o)))
    return holder(**parts, **({} if i == o else dict(skip_connection=conv(i, o, 1))))


def attention(c, d):
    return holder(to_q=nn.Linear(c, c, False), to_k=nn.Linear(d, c, False), to_v=nn.Linear(d, c, False), to_out=nn.Sequential(nn.Linear(c, c), nn.Dropout()))


def transformer(config, c):
    block = lambda: holder(attn1=attention(c, c), ff=holder(net=nn.Sequential(holder(proj=nn.Linear(c, 8 * c)), nn.Dropout(), nn.Linear(4 * c, c))),
                           attn2=attention(c, config.d_context), norm1=nn.LayerNorm(c), norm2=nn.LayerNorm(c), norm3=nn.LayerNorm(c))
    project = nn.Linear(c, c) if config.linear_proj else conv(c, c, 1)
    other = nn.Linear(c, c) if config.linear_proj else conv(c, c, 1)
    return holder(norm=nn.GroupNorm(1, c), proj_in=project, transformer_blocks=nn.ModuleList(block() for _ in range(config.depth)), proj_out=other)


def unet(config):
    """Three lists, each entry a short list, as the way down and up is walked."""
    c, d = config.width, config.d_time
    inputs, seen = nn.ModuleList([nn.Sequential(conv(config.c_in, c))]), [c]
    for level, width in enumerate(config.widths):
        for _ in range(config.blocks):
            inputs.append(nn.Sequential(resblock(c, width, d), *([transformer(config, width)] if config.attn[level] else [])))
            c = width
            seen.append(c)
        if level < len(config.widths) - 1:
            inputs.append(nn.Sequential(holder(op=conv(c, c))))
            seen.append(c)
    middle = nn.Sequential(resblock(c, c, d), transformer(config, c), resblock(c, c, d))
    outputs = nn.ModuleList()
    for level, width in reversed(list(enumerate(config.widths))):
        for i in range(config.blocks + 1):
            entry = [resblock(c + seen.pop(), width, d)] + ([transformer(config, width)] if config.attn[level] else [])
            c = width
            if level and i == config.blocks: entry.append(holder(conv=conv(c, c)))
            outputs.append(nn.Sequential(*entry))
    return holder(time_embed=nn.Sequential(nn.Linear(config.width, d), nn.SiLU(), nn.Linear(d, d)), input_blocks=inputs, middle_block=middle,
                  output_blocks=outputs, out=nn.Sequential(nn.GroupNorm(1, c), nn.SiLU(), conv(config.width, config.c_out)))


def plain_block(i, o):
    return holder(norm1=nn.GroupNorm(1, i), conv1=conv(i, o), norm2=nn.GroupNorm(1, o), conv2=conv(o, o), **({} if i == o else dict(nin_shortcut=conv(i, o, 1))))


def middle(c):
    attn = holder(norm=nn.GroupNorm(1, c), q=conv(c, c, 1), k=conv(c, c, 1), v=conv(c, c, 1), proj_out=conv(c, c, 1))
    return holder(block_1=plain_block(c, c), attn_1=attn, block_2=plain_block(c, c))


def autoencoder(config):
    """The decoder's levels are made from the deepest up and each is put in front of the list."""
    c, z, last = config.width, config.c_latent, len(config.widths) - 1
    down = nn.ModuleList()
    for i, width in enumerate(config.widths):
        blocks = nn.ModuleList(plain_block(c if j == 0 else width, width) for j in range(config.blocks))
        c = width
        down.append(holder(block=blocks, attn=nn.ModuleList(), **(dict(downsample=holder(conv=conv(c, c))) if i < last else {})))
    encoder = holder(conv_in=conv(config.c_in, config.width), down=down, mid=middle(c), norm_out=nn.GroupNorm(1, c), conv_out=conv(c, 2 * z))
    up, conv_in, mid = nn.ModuleList(), conv(z, c), middle(c)
    for i, width in reversed(list(enumerate(config.widths))):
        blocks = nn.ModuleList(plain_block(c if j == 0 else width, width) for j in range(config.blocks + 1))
        c = width
        up.insert(0, holder(block=blocks, attn=nn.ModuleList(), **(dict(upsample=holder(conv=conv(c, c))) if i else {})))
    decoder = holder(conv_in=conv_in, mid=mid, up=up, norm_out=nn.GroupNorm(1, c), conv_out=conv(c, config.c_in))
    return holder(encoder=encoder, decoder=decoder, quant_conv=conv(2 * z, 2 * z, 1), post_quant_conv=conv(z, z, 1))


class OpenCLIP(nn.Module):
    """OpenCLIP's text tower, which torch's own attention with its fused matrix is part of; it runs."""

    def __init__(self, config, layers):
        super().__init__()
        w = config.width
        block = lambda: holder(ln_1=nn.LayerNorm(w), attn=nn.MultiheadAttention(w, config.heads, batch_first=True), ln_2=nn.LayerNorm(w),
                               mlp=holder(c_fc=nn.Linear(w, config.mult * w), c_proj=nn.Linear(config.mult * w, w)))
        self.token_embedding = nn.Embedding(config.vocab, w)
        self.positional_embedding = nn.Parameter(torch.randn(config.window, w))
        self.transformer = holder(resblocks=nn.ModuleList(block() for _ in range(layers)))
        self.ln_final, self.text_projection, self.logit_scale = nn.LayerNorm(w), nn.Parameter(torch.randn(w, w)), nn.Parameter(torch.ones(()))

    def penultimate(self, tokens):
        """The state before the last block, normalised: what Stable Diffusion 2.x listens to."""
        n = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:n]
        for b in self.transformer.resblocks[:-1]:
            y = b.ln_1(x)
            x = x + b.attn(y, y, y, need_weights=False, attn_mask=torch.full((n, n), -torch.inf).triu(1))[0]
            x = x + b.mlp.c_proj(nn.functional.gelu(b.mlp.c_fc(b.ln_2(x))))
        return self.ln_final(x)
