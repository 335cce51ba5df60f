"""Many heads at once on the features of one trunk: a grid of settings as one program.

The settings that do best on validation are then trained as any run is (the protocol of DINOv2's
linear evaluation, arXiv:2304.07193, section 7 and appendix B). Heads that see the same batch share
its features, so that a step of all of them is one matrix product. (With several inputs a dropout's
mask is drawn for the columns of all of them: there a head of the grid is not bit for bit what it
would be alone.)
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import (
    cache_choice,
    config_checks,
    input_pipeline,
    losses,
    optimizer,
    parallel,
    param_tree,
    runner,
    sharing,
)
from tl_jax import train_step as steps
from tl_jax.config import Config, Grid
from tl_jax.errors import NotFinite, UserError
from tl_jax.feature_cache import Inputs
from tl_jax.feature_rows import ActivationRows
from tl_jax.input_pipeline import Rows
from tl_jax.job import Job
from tl_jax.models import heads
from tl_jax.parallel import DataParallel
from tl_jax.pretrained import Pretrained

WIDEST = "cls+mean"  # the input that holds the columns of all others


@dataclasses.dataclass(frozen=True)
class Setting:
    """One head of the grid."""

    learning_rate: float
    weight_decay: float
    seed: int
    input: str


def wanted(config: Config) -> bool:
    """Whether the configuration asks anything of a probe's features."""
    return has_grid(config) or bool(config.probe.baselines)


def has_grid(config: Config) -> bool:
    """Whether the configuration has a grid."""
    return config.probe.grid != Grid()


def features(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """All features [N, D] and labels [N] of a split."""
    assert isinstance(rows, ActivationRows)
    return rows.tree()[: len(rows)], rows.labels


def settings(config: Config) -> list[Setting]:
    """All heads of the grid; what it leaves out is as the rest of the configuration says."""
    grid = config.probe.grid
    axes = (
        grid.learning_rate or (config.optimizer.learning_rate,),
        grid.weight_decay or (config.optimizer.weight_decay,),
        grid.seed or (config.seed,),
        grid.input or (config.head.input,),
    )
    return [Setting(*values) for values in itertools.product(*axes)]


def widened(config: Config) -> Config:
    """The configuration whose head sees all that any head of the grid does."""
    inputs = config.probe.grid.input
    if not inputs:
        return config
    widest = inputs[0] if len(set(inputs)) == 1 else WIDEST
    return dataclasses.replace(config, head=dataclasses.replace(config.head, input=widest))


def with_setting(config: Config, chosen: Mapping[str, Any]) -> Config:
    """The configuration of one head of the grid alone."""
    setting = Setting(**chosen)
    return dataclasses.replace(
        config,
        seed=setting.seed,
        head=dataclasses.replace(config.head, input=setting.input),
        optimizer=dataclasses.replace(
            config.optimizer,
            learning_rate=setting.learning_rate,
            weight_decay=setting.weight_decay,
        ),
    )


def check(job: Job) -> None:
    """Whether the network can have a grid; `config_checks.of_probe` asks the configuration.

    Raises:
      UserError: the strategy trains more than the head; or heads of the grid would differ from lone
        ones.
    """
    problem = ""
    if len(job.stages) > 1 or job.plan.training_blocks != (len(job.plan.blocks) - 1,):
        problem = f"{job.plan.strategy} trains more than the head: take linear_probe"
    elif has_grid(job.config):
        problem = _grid_problem(job)
    if problem:
        raise UserError(f"config.probe: {problem}")


def _grid_problem(job: Job) -> str:
    """Why a head of a grid would not be what it is alone; "" where it would be."""
    config, plan = job.config, job.plan
    for name in ("learning_rate", "weight_decay"):
        if any(name in phase for phase in config.freeze.phases or ()):
            return f"freeze.phases sets {name}, over what a grid tries: set config.optimizer.{name}"
    if config.init_from is not None:
        return "a grid's heads begin anew, and config.init_from begins with a trained one"
    if not plan.trains(_entry(job.pretrained)):
        return f"{_entry(job.pretrained)} does not train, and a grid's heads differ in it"
    if config.probe.grid.seed and plan.trunk == "random":
        return "seed: the random trunk would change with it, too"
    return ""


def is_possible(job: Job) -> bool:
    """Whether heads could be searched among: only a head trains, on features that can be kept."""
    try:
        check(job)
    except UserError:
        return False
    if config_checks.of_probe(job.config):
        return False
    return bool(cache_choice.choose(job, job.stages[0], needed=True).first)


def search(job: Job, inputs: Inputs, devices: DataParallel) -> dict[str, Any]:
    """Trains every head of the grid; looks at validation after each epoch.

    Args:
      job: of `widened(config)`.
      inputs: the features, on the devices.
      devices: that train, each its share of every batch.

    Returns:
      "settings": for each its fields and the "validation" figures of its best epoch, None where its
      loss did not stay finite; "chosen": the fields of the best, by accuracy, then by loss.

    Raises:
      NotFinite: no head's loss stayed finite.
    """
    config, grid = job.config, settings(job.config)
    seeds = list(dict.fromkeys(setting.seed for setting in grid))
    by_seed = [[s for s in grid if s.seed == seed] for seed in seeds]  # [seeds, heads of each]
    stage = job.stages[0]
    _, frozen = steps.divide(stage.plan, job.pretrained.variables, stage.optimizer)
    masks = {s.input: _columns(job.pretrained, s.input) for s in grid}
    rates = np.array([[_rates(job, s) for s in row] for row in by_seed])
    hyper = {
        "weight_decay": np.array([[s.weight_decay for s in row] for row in by_seed], np.float32),
        "seed": np.array([[s.seed for s in row] for row in by_seed], np.uint32),
        "columns": np.array([[masks[s.input] for s in row] for row in by_seed], np.float32),
    }
    states = _stack([_stack([_begin(job, s, masks[s.input]) for s in row]) for row in by_seed])
    run, look = sharing.programs_of(
        job, stage, ("grid", job.steps_per_epoch), lambda job: _compile(job, devices)
    )
    states, hyper, frozen = devices.replicate((states, hyper, frozen))
    validation = inputs.rows["validation"]
    orders = [dataclasses.replace(runner.order_of(job), seed=seed) for seed in seeds]
    best: dict[Setting, dict[str, Any]] = {}
    diverged: set[Setting] = set()
    for number in range(1, config.train.epochs + 1):
        first, last = (number - 1) * job.steps_per_epoch, number * job.steps_per_epoch
        drawn = [order.batches(first, last) for order in orders]
        order = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *drawn)  # [n, seeds, steps]
        now = devices.replicate(rates[..., first:last])
        states = run(states, hyper, now, frozen, inputs.resident, devices.shard(order))
        sums = [
            jax.device_get(look(states, hyper, frozen, devices.shard(batch)))
            for batch in input_pipeline.all_batches(validation, config.data)
        ]
        hits, nats = (np.sum(part, axis=0) / len(validation) for part in zip(*sums, strict=True))
        for row, accuracies, losses_ in zip(by_seed, hits, nats, strict=True):
            for setting, accuracy, mean in zip(row, accuracies, losses_, strict=True):
                figures = {"accuracy": float(accuracy), "loss": float(mean), "epoch": number}
                if not np.isfinite(mean):  # alone it would be given up now
                    diverged.add(setting)
                    best.pop(setting, None)
                elif setting not in diverged and _rank(figures) > _rank(best.get(setting)):
                    best[setting] = figures
    if not best:
        raise NotFinite("config.probe.grid: no head's loss stayed finite; try lower learning rates")
    chosen = max(best, key=lambda setting: _rank(best[setting]))
    return {
        "settings": [
            {**dataclasses.asdict(setting), "validation": best.get(setting)} for setting in grid
        ],
        "chosen": dataclasses.asdict(chosen),
    }


def _compile(job: Job, devices: DataParallel) -> tuple[Callable, Callable]:
    """An epoch of all heads [seeds, heads of each], and what they do on a batch of validation."""
    stage, smoothing = job.stages[0], job.config.train.label_smoothing
    module, entry = job.pretrained.module, _entry(job.pretrained)
    steps_per_epoch = job.steps_per_epoch
    loss = steps.make_loss(module, stage.plan, smoothing, stage.plan.boundary)

    def masked(trainable, columns):
        """Parameters that see only the columns of the head's own input."""
        flat = param_tree.flatten(trainable)
        return param_tree.unflatten({**flat, entry: flat[entry] * columns[:, None]})

    def step(state, hyper, rate, frozen, batch):
        options = dataclasses.replace(stage.config, weight_decay=hyper["weight_decay"])
        rule = optimizer.make_optimizer(options, stage.plan, stage.clip_norm)

        def own(trainable, *rest):
            return loss(masked(trainable, hyper["columns"]), *rest)

        train_step = steps.make_train_step(
            own,
            rule,
            runner.activations,
            micro_batches=job.config.train.gradient_accumulation,
            axis_name=parallel.AXIS,
        )
        return train_step(state, frozen, steps.Hyper(hyper["seed"], rate), batch)

    def epoch(states, hyper, rates, frozen, rows, order):
        def of_seed(states, hyper, rates, order):
            batch = steps.look_up(rows, order)
            return jax.vmap(step, (0, 0, 0, None, None))(states, hyper, rates, frozen, batch)

        def body(i, states):
            now = jax.tree.map(lambda x: jnp.moveaxis(x[..., i], 1, 0), order)
            return jax.vmap(of_seed)(states, hyper, rates[..., i], now)[0]

        return jax.lax.fori_loop(0, steps_per_epoch, body, states)

    def evaluate(states, hyper, frozen, batch):
        def one(state, hyper):
            variables = steps.variables_of(
                masked(state.trainable, hyper["columns"]), state.statistics, frozen
            )
            logits = module.apply(variables, batch["activations"], first=stage.plan.boundary)
            real = batch["mask"] > 0
            hits = (logits.argmax(-1) == batch["label"]) & real
            nats = jnp.where(real, losses.cross_entropy(logits, batch["label"]), 0.0)
            return jax.lax.psum((hits.sum(), nats.sum()), parallel.AXIS)

        return jax.vmap(jax.vmap(one))(states, hyper)

    return (
        devices.compile(epoch, arguments=5, donate=True),
        devices.compile(evaluate, arguments=3),
    )


def _rank(figures: Mapping[str, Any] | None) -> tuple[float, float]:
    if figures is None:
        return (-np.inf, -np.inf)
    return (figures["accuracy"], -figures["loss"])


def narrowed(inputs: Inputs, wide: Pretrained, name: str, devices: DataParallel) -> Inputs:
    """The inputs of a head that sees `name`, of those for a wider one.

    Args:
      inputs: the features that the wide head sees.
      wide: the network with the wide head.
      name: as in `head.input`.
      devices: that hold the features.
    """
    columns = np.flatnonzero(_columns(wide, name))
    if len(columns) == len(_columns(wide, name)):
        return inputs
    part = slice(int(columns[0]), int(columns[-1]) + 1)
    rows = {}
    for role, found in inputs.rows.items():
        assert isinstance(found, ActivationRows)
        shards = [[leaf[:, part] for leaf in shard] for shard in found.shards]
        rows[role] = dataclasses.replace(found, shards=shards)
    train = rows["train"]
    resident = devices.replicate({"activations": train.tree(), "label": train.labels})
    return dataclasses.replace(inputs, rows=rows, resident=resident)


def _columns(wide: Pretrained, name: str) -> np.ndarray:
    """Which features of a head that sees several inputs belong to one of them: 0 or 1, [D]."""
    flat = param_tree.flatten(wide.variables["params"][wide.family.head])
    width = flat[_entry(wide).partition("/")[2]].shape[0]
    columns = np.zeros(width)
    own = wide.family.inputs[0] if name == "default" else name
    if heads.seen(wide.module.head, wide.family) == own:
        columns[:] = 1
    else:  # the class tokens of so many blocks, then the mean of the last one's patches
        size = width // (wide.module.head.last_blocks + 1)
        columns[-size:] = own == "pooled"
        columns[:-size] = own == "cls"
    return columns


def _entry(network: Pretrained) -> str:
    """Path of the kernel that the features enter."""
    first = "hidden/kernel" if network.module.head.kind == "mlp" else "kernel"
    return f"{network.family.head}/{first}"


def _begin(job: Job, setting: Setting, columns: np.ndarray) -> steps.TrainState:
    """The state of one head at its start, its kernel padded to all columns."""
    network, stage = job.pretrained, job.stages[0]
    head, entry = network.module.head, _entry(network).partition("/")[2]
    used = np.flatnonzero(columns)
    shapes = param_tree.flatten(network.variables["params"][network.family.head])
    kernel = shapes[entry]
    own = jax.ShapeDtypeStruct((len(used), *kernel.shape[1:]), kernel.dtype)
    initial = param_tree.flatten(
        heads.initial(head, param_tree.unflatten({**shapes, entry: own}), setting.seed)
    )
    initial[entry] = jnp.zeros(kernel.shape, kernel.dtype).at[used].set(initial[entry])
    params = {**network.variables["params"], network.family.head: param_tree.unflatten(initial)}
    # As with any weight decay: whether there is one must not shape the state.
    options = dataclasses.replace(stage.config, weight_decay=1.0)
    rule = optimizer.make_optimizer(options, stage.plan, stage.clip_norm)
    return steps.divide(stage.plan, {**network.variables, "params": params}, rule)[0]


def _rates(job: Job, setting: Setting) -> np.ndarray:
    """The learning rate of each step, float32 [steps]."""
    stage = job.stages[0]
    rate = setting.learning_rate * stage.plan.rate
    options = dataclasses.replace(stage.config, learning_rate=rate)
    schedule = optimizer.make_schedule(
        options, steps_per_epoch=job.steps_per_epoch, total_steps=job.total_steps
    )
    return schedule(np.arange(job.total_steps))


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
