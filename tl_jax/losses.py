"""The training loss."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of each example in nats, with smoothed targets (arXiv:1512.00567).

    Args:
      logits: float32 [N, C].
      labels: int32 [N].
      label_smoothing: e in the target (1 - e) · one_hot + e / C.

    Returns:
      float32 [N].
    """
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
