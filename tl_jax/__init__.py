"""Transfer learning of image classifiers in JAX: pretrained trunks, frozen and proved so."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_jax.pretrained import Head, Pretrained, load_pretrained, save_pretrained

__version__ = "0.1.0"
__all__ = ["Head", "Pretrained", "load_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """Imports JAX and the models when they are first asked for: the command line answers faster."""
    if name in __all__:
        from tl_jax import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
