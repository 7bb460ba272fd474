"""The text encoder is CLIP's, the image tower and the loss are CLIP's, and a small CLIP learns."""

import math

import pytest
import torch
from torch.testing import assert_close

from parity import randn, randomise
from sd_nb.model.clip import (CLIP, CLIPConfig, ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig, accuracy,
                              contrastive_loss)

TEXT = TextEncoderConfig(vocab=60, window=12, width=32, layers=2, heads=4)
IMAGE = ImageEncoderConfig(size=16, patch=4, width=24, layers=2, heads=3, mult=2)
SMALL = CLIPConfig(TEXT, IMAGE, d_embed=20)


def tokens(*lengths, vocab=60, window=12):
    "Rows of `length` random words between start (vocab - 2) and end (vocab - 1), padded with end."
    g = torch.Generator().manual_seed(sum(lengths))
    rows = torch.full((len(lengths), window), vocab - 1)
    for row, n in zip(rows, lengths):
        row[0], row[1:n + 1] = vocab - 2, torch.randint(vocab - 2, (n,), generator=g)
    return rows


def test_text_encoder_has_123060480_parameters():
    """The default config is CLIP ViT-L/14's text tower, to the parameter."""
    with torch.device("meta"):
        model = TextEncoder(TextEncoderConfig())
    assert sum(p.numel() for p in model.parameters()) == 123_060_480


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_text_encoder_is_transformers(act, tmp_path):
    """Saved for transformers and opened there, it gives the same last hidden state."""
    from transformers import CLIPTextModel
    from sd_nb.interop import save_text_encoder

    ours = randomise(TextEncoder(TextEncoderConfig(vocab=60, window=12, width=32, layers=3, heads=4, mult=3, act=act))).eval()
    save_text_encoder(tmp_path, ours)
    theirs = CLIPTextModel.from_pretrained(tmp_path, subfolder="text_encoder").eval()
    ids = tokens(3, 10, 0)
    with torch.no_grad():
        a, b = ours(ids), theirs(input_ids=ids).last_hidden_state
    assert a.std() > 0.1
    assert_close(a, b, atol=1e-5, rtol=1e-5)


def hf_clip(config):
    "A transformers CLIPModel of our shape, and the table of its image tower's names."
    from transformers import CLIPConfig as HFConfig, CLIPModel
    parts = dict(text=dict(vocab_size=config.text.vocab, max_position_embeddings=config.text.window),
                 vision=dict(image_size=config.image.size, patch_size=config.image.patch))
    for part, c in zip(parts.values(), (config.text, config.image)):
        part |= dict(hidden_size=c.width, intermediate_size=c.mult * c.width, num_hidden_layers=c.layers,
                     num_attention_heads=c.heads, hidden_act=c.act)
    end = config.text.vocab - 1
    parts["text"] |= dict(bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
    return CLIPModel(HFConfig(text_config=parts["text"], vision_config=parts["vision"], projection_dim=config.d_embed)).eval()


def to_hf(state):
    "Our whole CLIP under transformers' names: the text tower by interop's table, the image tower likewise."
    from sd_nb.interop import TEXT_NAMES, rename
    image = {k: v.replace("text_model.", "vision_model.") for k, v in TEXT_NAMES.items()} | {
        "summary": "vision_model.embeddings.class_embedding", "patch_embedding": "vision_model.embeddings.patch_embedding",
        "norm_in": "vision_model.pre_layrnorm", "norm_out": "vision_model.post_layernorm"}
    out = {}
    for part, table in (("text.", TEXT_NAMES), ("image.", image)):
        out |= rename({k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}, table)
    return out | {"text_projection.weight": state["text_projection.weight"],
                  "visual_projection.weight": state["image_projection.weight"], "logit_scale": state["logit_scale"]}


def test_clip_is_transformers():
    """Both embeddings and the contrastive loss are those of transformers' CLIPModel."""
    ours, theirs = randomise(CLIP(SMALL)).eval(), hf_clip(SMALL)
    missing, unexpected = theirs.load_state_dict(to_hf(ours.state_dict()), strict=False)
    assert not unexpected and all("position_ids" in k for k in missing)
    ids, x = tokens(3, 10, 1, 5), randn(4, 3, 16, 16)
    with torch.no_grad():
        result = theirs(input_ids=ids, pixel_values=x, return_loss=True)
        text, image = ours.embed_text(ids), ours.embed_image(x)
        loss = contrastive_loss(image, text, ours.logit_scale)
    assert_close(text, result.text_embeds, atol=1e-5, rtol=1e-5)
    assert_close(image, result.image_embeds, atol=1e-5, rtol=1e-5)
    assert_close(loss, result.loss, atol=1e-5, rtol=1e-5)


def test_text_is_read_from_left_to_right():
    """A token changes what stands after it, and nothing before it."""
    model, ids = randomise(TextEncoder(TEXT)), tokens(8)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 58
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().amax(-1).min() > 1e-4


def test_text_embedding_is_read_at_the_first_end():
    """What stands after the end of the text does not matter to its embedding."""
    model, ids = randomise(CLIP(SMALL)), tokens(4, 6)
    padded = ids.clone()
    padded[0, 6:] = 0
    assert_close(model.embed_text(ids), model.embed_text(padded))
    assert_close(model.embed_text(ids[:, :8]), model.embed_text(ids))
    assert_close(model.embed_text(ids).norm(dim=-1), torch.ones(2))
    assert_close(model.embed_image(randn(2, 3, 16, 16)).norm(dim=-1), torch.ones(2))


def test_contrastive_loss_at_its_ends():
    """Equal similarities cost log(b), perfect pairs nearly nothing, and shuffling the pairs together changes nothing."""
    one = torch.ones(8, 4) / 2
    assert_close(contrastive_loss(one, one, torch.tensor(2.0)), torch.tensor(math.log(8)))
    eye = torch.eye(8)
    assert contrastive_loss(eye, eye, torch.tensor(4.6)) < 1e-3
    a, b = (torch.nn.functional.normalize(randn(8, n), dim=-1)[:, :5] for n in (5, 6))
    order, scale = torch.randperm(8, generator=torch.Generator().manual_seed(0)), torch.tensor(1.0)
    assert_close(contrastive_loss(a, b, scale), contrastive_loss(a[order], b[order], scale))
    assert_close(contrastive_loss(a, b, scale), contrastive_loss(b, a, scale))
    assert torch.equal(contrastive_loss(a, b, torch.tensor(9.0)), contrastive_loss(a, b, torch.tensor(math.log(100))))


def test_accuracy():
    """Accuracy is the part of pictures whose nearest text is their own."""
    eye = torch.eye(4)
    assert accuracy(eye, eye) == 1
    assert accuracy(eye, eye[[1, 0, 2, 3]]) == 0.5


def test_clip_learns():
    """Colours and their names find each other in a few steps."""
    torch.manual_seed(0)
    model, ids = CLIP(SMALL), tokens(1, 2, 3, 4)
    x = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])[:, :, None, None].expand(4, 3, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        noisy = x + 0.3 * torch.randn(4, 3, 16, 16)
        loss = contrastive_loss(model.embed_image(noisy), model.embed_text(ids), model.logit_scale)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert accuracy(model.embed_image(x), model.embed_text(ids)) == 1
    assert loss < 0.5
    assert all(p.grad is not None for p in model.parameters())


def test_bad_shapes():
    """Too long a text, a picture of another size and settings that contradict each other are named."""
    with pytest.raises(ValueError, match="13 tokens .* window of 12"):
        TextEncoder(TEXT)(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="16x20 is not 16x16"):
        ImageEncoder(IMAGE)(randn(1, 3, 16, 20))
    with pytest.raises(ValueError, match="size 30 .* patches of 8"):
        ImageEncoderConfig(size=30)
    with pytest.raises(ValueError, match="'relu' is not one of quick_gelu, gelu"):
        TextEncoder(TextEncoderConfig(vocab=9, width=8, heads=2, layers=1, act="relu"))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_masks_and_earlier_states_are_transformers(act, tmp_path):
    """Every hidden state, with and without an attention mask, equals transformers'; so do the gradients."""
    from transformers import CLIPTextModel
    from sd_nb.interop import save_text_encoder

    ours = randomise(TextEncoder(TextEncoderConfig(vocab=60, window=12, width=32, layers=3, heads=4, act=act))).eval()
    save_text_encoder(tmp_path, ours)
    theirs = CLIPTextModel.from_pretrained(tmp_path, subfolder="text_encoder").eval()
    norm_out = next(m for name, m in theirs.named_modules() if name.endswith("final_layer_norm"))
    ids, real = tokens(3, 10, 0), torch.arange(12) < torch.tensor([[5], [12], [2]])
    for mask in (None, real):
        states = theirs(input_ids=ids, attention_mask=None if mask is None else mask.long(), output_hidden_states=True)
        for skip in range(3):
            a, b = ours(ids, mask, skip), norm_out(states.hidden_states[-1 - skip])
            assert_close(a, b, atol=1e-5, rtol=1e-5)
            grads = [torch.autograd.grad((y * y.detach().roll(1)).sum(), p, retain_graph=True)[0] for y, p in (
                (a, ours.token_embedding.weight), (b, theirs.get_input_embeddings().weight))]
            assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()
    assert (ours(ids, real) - ours(ids)).abs().max() > 1e-3


def test_no_block_left_is_refused():
    """As many blocks as there are cannot be left out, nor fewer than none."""
    model = TextEncoder(TextEncoderConfig(vocab=60, window=12, width=32, layers=2, heads=4))
    for skip in (2, -1):
        with pytest.raises(ValueError, match="from 0 to 1 blocks"):
            model(torch.zeros(1, 12, dtype=torch.int64), skip=skip)
