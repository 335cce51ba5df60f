"""Transfer learning of image classifiers in JAX: pretrained trunks, frozen and proved so."""

from tl_jax.pretrained import Pretrained, load_pretrained, save_pretrained

__version__ = "0.1.0"
__all__ = ["Pretrained", "load_pretrained", "save_pretrained"]
