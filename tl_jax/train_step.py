"""The training step: one pure function of a state, what is frozen, and a batch."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tl_jax import lora, losses, param_tree
from tl_jax.freezing import Plan


class TrainState(NamedTuple):
    """All that a step changes, and all that a checkpoint keeps.

    Attributes:
      step: int32 [], steps done.
      trainable: tree of the parameters that train.
      statistics: tree of the BatchNorm statistics that move.
      optimizer: state of the optimizer over `trainable`.
    """

    step: jax.Array
    trainable: Any
    statistics: Any
    optimizer: Any


class Frozen(NamedTuple):
    """What no step changes.

    Attributes:
      params: tree of the other parameters.
      statistics: tree of the other statistics.
      start: what the trainable parameters were before any training, where one is pulled toward it.
    """

    params: Any
    statistics: Any
    start: Any


class Hyper(NamedTuple):
    """What a sweep varies: data to the step, so that its runs share one compiled program.

    Attributes:
      seed: uint32 [], of augmentation and dropout.
      rate: float32 [], the step's learning rate, before any group's multiplier.
    """

    seed: Any
    rate: Any


TrainStep = Callable[[TrainState, Frozen, Hyper, dict[str, jax.Array]], tuple[TrainState, dict]]


def divide(
    plan: Plan,
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    start: dict[str, Any] | None = None,
) -> tuple[TrainState, Frozen]:
    """The state that a phase's training starts from, and what it leaves alone.

    `variables_of` undoes it. `start` holds the parameters before any training, by default those of
    `variables`.
    """
    trainable, frozen = plan.split_params(variables["params"])
    moving, still = plan.split_statistics(variables.get("batch_stats", {}))
    pulled = any(group.pull for group in plan.groups.values())
    origin = plan.split_params(start or variables["params"])[0] if pulled else {}
    # A step gives its state's buffers up, so they are the state's own.
    trainable, moving = jax.tree.map(jnp.array, (trainable, moving))
    state = TrainState(jnp.zeros((), jnp.int32), trainable, moving, optimizer.init(trainable))
    return state, Frozen(frozen, still, origin)


def variables_of(trainable: Any, statistics: Any, frozen: Frozen) -> dict[str, Any]:
    """The whole network's variables, as `module.apply` takes them."""
    return {
        "params": param_tree.merge(trainable, frozen.params),
        "batch_stats": param_tree.merge(statistics, frozen.statistics),
    }


def make_loss(
    module: nn.Module,
    plan: Plan,
    label_smoothing: float = 0.0,
    first: int = 0,
    *,
    rematerialise: bool = False,
    form: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Callable:
    """The loss as a function of what trains.

    Args:
      module: the network.
      plan: says what trains.
      label_smoothing: share of the target that is spread evenly over all classes.
      first: the block that its input enters: 0 for images, or `plan.boundary` for what the prefix
        made of them.
      rematerialise: whether the backward pass computes each block again instead of keeping all that
        it needs: one forward pass above the boundary more, and memory for one block.
      form: a context in which layers compute the same in another form; it is entered inside that of
        the adapters, which add to what a layer gives, whatever its form.

    Returns:
      `loss(trainable, statistics, frozen, x, labels, keys)` → mean loss [] in nats and (logits
      float32 [N, C], statistics after the batch). Images are preprocessed, float [N, H, W,
      channels]; keys are typed PRNG keys [N] for dropout.
    """

    def run(variables, x, keys, **options):
        with lora.applied(plan.adapters, variables["params"], keys), form():
            return module.apply(
                variables,
                x,
                training=plan.training_blocks,
                batch_norm=plan.batch_norm_blocks,
                keys=keys,
                mutable=["batch_stats"],
                **options,
            )

    def block_by_block(variables, x, keys):
        moved: dict[str, Any] = {}
        count = len(plan.blocks)  # norm or pool, and head, go with the block that they read
        starts = [plan.boundary, *range(plan.boundary + 1, count - 2)]
        for first, last in zip(starts, [*starts[1:], count], strict=True):
            block = functools.partial(run, first=first, last=last)
            x, moved = jax.checkpoint(block)({**variables, **moved}, x, keys)
        return x, moved

    def loss(trainable, statistics, frozen, x, labels, keys):
        # The prefix holds nothing that trains, so it stands outside of what is differentiated.
        moved = {}
        if first < plan.boundary:
            below = variables_of({}, statistics, frozen)
            x, moved = run(below, x, keys, first=first, last=plan.boundary)
        variables = {**variables_of(trainable, statistics, frozen), **moved}
        if rematerialise:
            logits, moved_above = block_by_block(variables, x, keys)
        else:
            logits, moved_above = run(variables, x, keys, first=plan.boundary)
        if plan.statistics:
            statistics, _ = plan.split_statistics(moved_above["batch_stats"])
        mean = losses.cross_entropy(logits, labels, label_smoothing).mean()
        return mean, (logits, statistics)

    return loss


def make_train_step(
    loss: Callable,
    optimizer: optax.GradientTransformationExtraArgs,
    preprocess: Callable,
    *,
    micro_batches: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """One step of data-parallel training, the same function for every device.

    Args:
      loss: as `make_loss` gives it.
      optimizer: over the trainable parameters.
      preprocess: `preprocess(batch, keys [N])` → what the loss takes, from a batch's leaves [N, …].
      micro_batches: parts of the device's batch whose gradients are accumulated.
      axis_name: of the devices, over which gradients are averaged; None on a single one.

    Returns:
      `step(state, frozen, hyper, batch)` → (state, metrics). batch: label int32 [N], index int32
      [N], and what `preprocess` takes. metrics: float32 [] each, the mean over the global batch;
      "objective" is what is differentiated (penalties on weights are the optimizer's), "loss" the
      cross-entropy without label smoothing. Keys are made of (seed, step, example).
    """

    def mean_over_devices(tree):
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def gradients(state, frozen, seed, batch):
        """Gradients of one micro-batch on one device, its metrics, and the statistics after it."""
        keys = example_keys(seed, state.step, batch["index"])
        x = preprocess(batch, keys[:, 0])
        (value, (logits, statistics)), grads = jax.value_and_grad(loss, has_aux=True)(
            state.trainable, state.statistics, frozen, x, batch["label"], keys[:, 1]
        )
        plain = losses.cross_entropy(logits, batch["label"]).mean()  # as evaluation reports it
        accuracy = (logits.argmax(-1) == batch["label"]).mean()
        return grads, {"objective": value, "loss": plain, "accuracy": accuracy}, statistics

    def train_step(state, frozen, hyper, batch):
        if micro_batches == 1:
            grads, metrics, statistics = gradients(state, frozen, hyper.seed, batch)
        else:
            grads, metrics, statistics = accumulate(state, frozen, hyper.seed, batch)
        # Statistics are the same on all already: BatchNorm averages what it updates them with, and
        # the mean of equal numbers need not be that number.
        grads, metrics = mean_over_devices((grads, metrics))
        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, state.trainable, rate=hyper.rate, start=frozen.start
        )
        trainable = optax.apply_updates(state.trainable, updates)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, trainable, statistics, optimizer_state), metrics

    def accumulate(state, frozen, seed, batch):
        def body(carry, micro_batch):
            total, statistics = carry
            grads, metrics, statistics = gradients(
                state._replace(statistics=statistics), frozen, seed, micro_batch
            )
            return (jax.tree.map(jnp.add, total, (grads, metrics)), statistics), None

        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        metrics = dict.fromkeys(("objective", "loss", "accuracy"), jnp.zeros(()))
        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        (total, statistics), _ = jax.lax.scan(body, ((zeros, metrics), state.statistics), parts)
        grads, metrics = jax.tree.map(lambda x: x / micro_batches, total)
        return grads, metrics, statistics

    return train_step


def make_steps(step: TrainStep) -> Callable:
    """Many steps as one program, over rows that lie on the device.

    Returns:
      `run(state, frozen, hyper, rows, count, order)` → (state, metrics). hyper: with a rate [S] for
      each of S ≥ count steps. rows: leaves [R, …] as a batch has them, "label" [N]; row i + v N is
      view v of example i. count: int32 [], how many steps. order: "index" (and "view") int32
      [n, S], their examples. metrics: float32 [S] each, of which the first `count` are filled.
    """

    def run(state, frozen, hyper, rows, count, order):
        def one_step(i, state):
            now = hyper._replace(rate=hyper.rate[i])
            return step(state, frozen, now, look_up(rows, jax.tree.map(lambda x: x[:, i], order)))

        def body(i, carry):
            state, metrics = carry
            state, found = one_step(i, state)
            return state, jax.tree.map(lambda all, one: all.at[i].set(one), metrics, found)

        shapes = jax.eval_shape(lambda: one_step(0, state)[1])
        length = order["index"].shape[1]
        metrics = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return run


def look_up(rows: dict[str, Any], order: dict[str, jax.Array]) -> dict[str, Any]:
    """The batch with these examples: leaves [n, …], and `order` itself."""
    count, index = len(rows["label"]), order["index"]
    found = {"label": rows["label"][index], **order}
    if "image" in rows:
        return {**found, "image": rows["image"][index]}
    row = index + order["view"] * count if "view" in order else index
    return {**found, "activations": jax.tree.map(lambda x: x[row], rows["activations"])}


def example_keys(seed: jax.Array, step: jax.Array, index: jax.Array) -> jax.Array:
    """Typed PRNG keys [N, 2] of the examples [N] in a step: for augmentation, and for dropout."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.vmap(lambda key: jax.random.split(key, 2))(keys)
