"""The training step: time, memory and FLOPs, by strategy, by depth of the boundary, by image size.

    python benchmarks/step.py --config CONFIG [--vary strategy | depth | image_size] \
        [--values a b …] [--torch eager compile] [--peak TFLOPS] [--config.FIELD=VALUE …]

Times one step on one device, preprocessed images in its memory: median of `--calls` after the
first. Beside it stand XLA's own count of FLOPs, the least that the step needs (`tl_jax.costs`; the
law that the time should follow), and the bytes that the compiled program holds at once. With
`--torch`, the same step by PyTorch and transformers (the same parameters trainable, channels last,
eval mode as BatchNorm is frozen, SGD with momentum; on a GPU under autocast where `model.dtype` is
bfloat16, in TensorFloat-32 where `model.precision` says so): needs torch. With `--peak`, the chip's
own in the dtype that is used, the table gives the share of it that the least FLOPs come to. Prints
a table and JSON lines.
"""

import argparse
import json
import re
import statistics
import time

import jax
import numpy as np

from tl_jax import config_files, job, layer_forms, prefix, stages, strategies
from tl_jax import train_step as steps
from tl_jax.step_cost import step_cost


def configuration(flags, overrides, **fields):
    """The run's configuration with these fields over it."""
    fixed = {"control": "None", "cache": "off", **fields}
    text = [*overrides, *((name, str(value)) for name, value in fixed.items())]
    return config_files.resolve(config_files.load_config(flags.config), text)


def cases(flags, overrides):
    """(label, configuration) of each row."""
    if flags.vary == "strategy":
        for name in flags.values or strategies.STRATEGIES:
            yield name, configuration(flags, overrides, **{"freeze.strategy": name})
    elif flags.vary == "depth":
        yield 0, configuration(flags, overrides, **{"freeze.strategy": "linear_probe"})
        probe = job.prepare(configuration(flags, overrides)).plan
        most = max(p.depth for p in probe.parameters)
        for k in map(int, flags.values or range(1, most + 1)):
            fields = {"freeze.strategy": "top_k", "freeze.k": k}
            yield k, configuration(flags, overrides, **fields)
        yield most + 1, configuration(flags, overrides, **{"freeze.strategy": "full"})
    else:
        for size in map(int, flags.values or (32, 64, 96, 128, 160)):
            yield size, configuration(flags, overrides, **{"model.image_size": size})


def batch_of(run):
    """One batch of random numbers as the network takes them."""
    rng, size = np.random.default_rng(0), run.config.data.batch_size
    height, width = run.pretrained.preprocessing.output_size
    channels = run.pretrained.preprocessing.channels
    return {
        "image": rng.normal(size=(size, height, width, channels)).astype(np.float32),
        "label": rng.integers(0, len(run.class_names), size).astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
    }


def median_seconds(call, calls):
    """Median time of `call()`, which waits until it is done; the first is not counted."""
    call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours(run, stage, calls):
    """Seconds of a step and the bytes of its programs, the prefix's and its own."""
    images, labels = (batch := batch_of(run))["image"], batch
    state, frozen = steps.divide(stage.plan, dict(run.pretrained.variables), stage.optimizer)
    first, below, taken = 0, None, 0
    if prefix.can_be_ready(stage.plan):
        below = stages.prefix_of(run, stage)(run.pretrained.variables)
        first, frozen = stage.plan.boundary, stages.above(run, stage, frozen)
        run_below = jax.jit(lambda b, x: prefix.apply(run.pretrained.module, stage.plan, b, x))
        run_below = run_below.lower(below, images).compile()
        taken = size(run_below)
    loss = steps.make_loss(run.pretrained.module, stage.plan, first=first)

    def on_backend(*args):
        with layer_forms.suited(differentiated=True):
            return loss(*args)

    step = steps.make_train_step(on_backend, stage.optimizer, lambda b, keys: b["x"])
    hyper = steps.Hyper(np.uint32(0), np.float32(run.config.optimizer.learning_rate))
    state, frozen, images, labels = jax.device_put((state, frozen, images, labels))
    del labels["image"]

    def input_of_step():
        return {"x": images if below is None else run_below(below, images), **labels}

    compiled = jax.jit(step, donate_argnums=0)
    compiled = compiled.lower(state, frozen, hyper, input_of_step()).compile()

    def call():
        nonlocal state
        state, metrics = compiled(state, frozen, hyper, input_of_step())
        jax.block_until_ready((state, metrics))

    return median_seconds(call, calls), max(taken, size(compiled))


def size(compiled):
    """Bytes that a program holds at once."""
    memory = compiled.memory_analysis()
    taken = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return taken + memory.output_size_in_bytes - memory.alias_size_in_bytes


def pytorch(run, stage, calls, mode):
    """Seconds of the same step by PyTorch, and its peak memory where it is a GPU's."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.compiler.reset()
    family, dtype = run.pretrained.family, run.config.model.dtype
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        fast = run.config.model.precision == "tensorfloat32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = fast
        torch.backends.cudnn.benchmark = True
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = transformers.AutoModelForImageClassification.from_pretrained(
        run.pretrained.checkpoint.folder,
        num_labels=len(run.class_names),
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
    model = model.eval().to(device, memory_format=torch.channels_last)
    trains = {p.name for p in stage.plan.parameters if stage.plan.trains(p.path)}
    unprefixed = {name.removeprefix(f"{family.prefix}.") for name in trains}
    for name, parameter in model.named_parameters():
        for pattern, new in family.renames:
            name = re.sub(pattern, new, name)
        parameter.requires_grad_(name.removeprefix(f"{family.prefix}.") in unprefixed)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(trains), (len(trained), len(trains))
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    sized = {"interpolate_pos_encoding": True} if family.model_type == "vit" else {}
    network = torch.compile(model) if mode == "compile" else model
    batch = batch_of(run)
    x = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(batch["label"]).long().to(device)

    def call():
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            logits = network(x, **sized).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = median_seconds(call, calls)
    return seconds, torch.cuda.max_memory_allocated() if device == "cuda" else None


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--vary", choices=("strategy", "depth", "image_size"), default="strategy")
    parser.add_argument("--values", nargs="+")
    parser.add_argument("--torch", nargs="+", choices=("eager", "compile"), default=[])
    parser.add_argument("--calls", type=int, default=7)
    parser.add_argument("--peak", type=float, help="of the chip in this dtype, TFLOP/s")
    flags, rest = parser.parse_known_args()
    overrides = [tuple(word.removeprefix("--config.").split("=", 1)) for word in rest]
    rows = []
    for label, config in cases(flags, overrides):
        run = job.prepare(config)
        priced = step_cost(run)
        parts = config.train.gradient_accumulation * jax.device_count()  # here on one device
        for stage, cost in zip(run.stages, priced.get("phases", [priced]), strict=True):
            seconds, nbytes = ours(run, stage, flags.calls)
            row = {
                "case": label,
                "phase": stage.plan.phase,
                "boundary": stage.plan.boundary,
                "images_per_second": config.data.batch_size / seconds,
                "seconds": seconds,
                "bytes": nbytes,
                "flops": cost["flops_per_step"] * parts,
                "flops_minimum": cost["flops_minimum"] * parts,
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
            }
            for mode in flags.torch if stage.plan.adapters is None else ():
                row[f"torch_{mode}_seconds"], row[f"torch_{mode}_bytes"] = pytorch(
                    run, stage, flags.calls, mode
                )
            rows.append(row)
            print(json.dumps(row), flush=True)
    modes = "".join(f" {mode} PyTorch / ours |" for mode in flags.torch)
    peak = "" if flags.peak is None else " of the peak |"
    print(f"| {flags.vary} | phase | images/s | GFLOP | × least | GFLOP/s |{peak} MB |{modes}")
    print("|---|---|---|---|---|---|---|" + "---|" * (len(flags.torch) + bool(peak)))
    for r in rows:
        ratios = "".join(
            f" {r[key] / r['seconds']:.2f} |" if (key := f"torch_{mode}_seconds") in r else " – |"
            for mode in flags.torch
        )
        rate = r["flops_minimum"] / r["seconds"]
        share = f" {rate / flags.peak / 1e12:.1%} |" if peak else ""
        print(
            f"| {r['case']} | {r['phase']} | {r['images_per_second']:.0f} | "
            f"{r['flops'] / 1e9:.1f} | {r['flops'] / r['flops_minimum']:.3f} | "
            f"{rate / 1e9:.0f} |{share} {r['bytes'] / 1e6:.0f} |{ratios}"
        )


if __name__ == "__main__":
    main()
