"""Stable Diffusion from scratch: a book of notebooks, and the package they export."""
__version__ = "0.0.1"

def __getattr__(name):
    "Import `StableDiffusion` on first use, so that `sd-nb --help` need not load PyTorch"
    if name != "StableDiffusion": raise AttributeError(f"module 'sd_nb' has no attribute {name!r}")
    from sd_nb.pipeline import StableDiffusion
    return StableDiffusion
