"""The plan in the terminal: a table a phase, and a tree."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.progress
from rich.console import Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tl_jax import plan_rows
from tl_jax.plan_rows import Leaf

WIDEST_NAME = 24  # of a group; a longer one is folded
MOST_RUNS = 3  # of blocks that are named one by one


def plan_table(plan: Mapping[str, Any]) -> Group:
    """The plan (the content of `plan.json`): for each phase a table with a row a group."""
    phases = plan["phases"]
    tables = [
        [
            _group_row(name, leaves, phase)
            for name, leaves in plan_rows.by_group(phase["leaves"], numbered=False).items()
        ]
        for phase in phases
    ]
    rows = [row for table in tables for row in table]
    shown = [c for c in rows[0] if c != "pull" or any(row[c] != "–" for row in rows)]
    parts: list[Any] = [Text(f"Plan: {plan['strategy']}, the trunk's weights {plan['trunk']}\n")]
    for number, (phase, table) in enumerate(zip(phases, tables, strict=True)):
        if len(phases) > 1:
            parts.append(Text(_phase_title(number, phase, len(phases)), style="bold"))
        drawn = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_header=not number)
        drawn.show_edge = False
        for column in shown:
            width = max(len(row[column]) for row in [*rows, {column: column}])
            if column == "blocks":
                drawn.add_column(column, overflow="fold")
            elif column == "group":
                drawn.add_column(column, overflow="fold", min_width=min(width, WIDEST_NAME))
            else:
                drawn.add_column(column, justify="right", no_wrap=True, min_width=width)
        for row in table:
            drawn.add_row(*(Text(row[column]) for column in shown))
        parts += [drawn, ""]
    return Group(*parts, Text("\n".join(_remarks(plan))))


def _group_row(name: str, leaves: Sequence[Leaf], phase: Mapping[str, Any]) -> dict[str, str]:
    """What a phase's table says of one group, by column."""
    filled = {leaf["block_index"] for leaf in phase["leaves"]}
    row = {
        "group": name,
        "parameters": f"{plan_rows.parameters(leaves):,}",
        **dict.fromkeys(("rate", "decay", "pull", "state bytes"), "–"),
        "blocks": _block_names(leaves, phase["blocks"], sorted(filled)),
    }
    if name != "frozen":
        rate = phase["learning_rate"]
        row["decay"] = "0"
        row["rate"] = plan_rows.span(rate * leaf["learning_rate_multiplier"] for leaf in leaves)
        row["state bytes"] = f"{sum(leaf['optimizer_state_bytes'] for leaf in leaves):,}"
        for column, field in (("decay", "weight_decay"), ("pull", "pull_toward_start")):
            if values := [leaf[field] for leaf in leaves if leaf[field]]:
                row[column] = plan_rows.span(values)
    return row


def _block_names(leaves: Sequence[Leaf], blocks: Sequence[str], filled: Sequence[int]) -> str:
    """`stem … layers_1, head`; the numbers of many scattered blocks, not their names."""
    here = {leaf["block_index"] for leaf in leaves}
    found = plan_rows.runs(here, filled, dict.fromkeys(filled))
    if len(found) > MOST_RUNS:
        return f"{len(here)} blocks between {blocks[found[0][0]]} and {blocks[found[-1][-1]]}"
    return ", ".join(_run_name(run, blocks) for run in found)


def _run_name(run: Sequence[int], blocks: Sequence[str]) -> str:
    return blocks[run[0]] if len(run) == 1 else f"{blocks[run[0]]} … {blocks[run[-1]]}"


def _phase_title(number: int, phase: Mapping[str, Any], phases: int) -> str:
    moving = len(phase["moving_statistics"]) if phase["batch_norm"] == "batch" else 0
    return (
        f"Phase {number + 1} of {phases}, {phase['name']}: {_steps(phase)}, {phase['optimizer']}; "
        f"gradients end at {phase['boundary_block']}"
        + (f"; {moving} BatchNorm statistics move" if moving else "")
    )


def _steps(phase: Mapping[str, Any]) -> str:
    return (
        f"{_counted(phase['epochs'], 'epoch', '.4g')} "
        f"(steps {phase['first_step']:,} to {phase['last_step']:,})"
    )


def _counted(number: float, noun: str, form: str = ",") -> str:
    return f"{number:{form}} {noun}" + "s" * (number != 1)


def _remarks(plan: Mapping[str, Any]) -> list[str]:
    """What holds for the whole plan, a sentence a line, and its notes."""
    phases, lines = plan["phases"], []
    state = f"{plan['optimizer_state_bytes']:,} bytes of state"
    if len(phases) == 1:
        lines.append(
            f"Gradients end at {plan['boundary_block']} "
            f"(block {plan['boundary']} of 0 to {len(plan['blocks']) - 1})."
        )
    lines += _batch_norm(plan)
    if len(phases) == 1:
        lines.append(f"Optimizer {plan['optimizer']}: {state}.")
    else:
        lines.append(f"The optimizer keeps at most {state}.")
    trained = [leaf for phase in phases for leaf in phase["leaves"] if leaf["group"] != "frozen"]
    decays = {(leaf["group"], leaf["weight_decay"] > 0) for leaf in trained}
    if any((group, not decayed) in decays for group, decayed in decays):
        lines.append("Weight decay acts on kernels only.")
    if any(leaf["pull_toward_start"] for leaf in trained):
        lines.append("Pull: decay toward the value that training started from.")
    return lines + [f"Note: {note}" for note in plan["notes"]]


def _batch_norm(plan: Mapping[str, Any]) -> list[str]:
    """What becomes of the running statistics, if there are any."""
    moving, frozen = len(plan["moving_statistics"]), len(plan["frozen_statistics"])
    if not moving + frozen:
        return []
    move = "are measured anew" if plan["batch_norm"] == "reestimate" else "move with the batch"
    lines = [
        f"BatchNorm statistics (freeze.batch_norm={plan['batch_norm']}): "
        f"{moving} {move}, {frozen} stay frozen."
    ]
    if plan["trunk"] == "random" and not moving:
        lines += [
            "Random weights run on statistics that nobody measured: a weak control",
            "(for from_scratch, freeze.batch_norm=batch is a fairer one).",
        ]
    return lines


def plan_tree(plan: Mapping[str, Any]) -> Group:
    """The map of the network, group by group, and what would run with it."""
    tree = Tree(
        f"{len(plan['blocks'])} blocks, {plan_rows.parameters(plan['leaves']):,} parameters; "
        "in brackets the fraction of depth, 0 in the stem and 1 in the head"
    )
    phases = plan["phases"]
    trained: dict[str, list[Leaf]] = {leaf["path"]: [] for leaf in plan["leaves"]}
    times: dict[str, tuple[int, ...]] = dict.fromkeys(trained, ())
    for number, phase in enumerate(phases, start=1):
        for leaf in phase["leaves"]:
            if leaf["group"] != "frozen":
                trained[leaf["path"]].append(leaf)
                times[leaf["path"]] += (number,)
    filled = sorted({leaf["block_index"] for leaf in plan["leaves"]})
    for name, group in plan_rows.by_group(plan["leaves"]).items():
        for when in sorted({times[leaf["path"]] for leaf in group}):
            leaves = [leaf for leaf in group if times[leaf["path"]] == when]
            text = f": {plan_rows.parameters(leaves):,} parameters"
            if len(phases) > 1:
                text += f", {_when(when, len(phases))}"
            branch = tree.add(Text.assemble((name, "bold"), text))
            _add_blocks(branch, leaves, trained, plan["blocks"], filled)
    return Group("", tree, "", _what_would_run(plan))


def _when(numbers: Sequence[int], phases: int) -> str:
    """In which phases."""
    if not numbers or len(numbers) == phases:
        return "throughout" if not numbers else "trains in all phases"
    if len(numbers) == 1:
        return f"trains in phase {numbers[0]}"
    if len(numbers) == 1 + numbers[-1] - numbers[0]:
        return f"trains in phases {numbers[0]} to {numbers[-1]}"
    return f"trains in phases {', '.join(map(str, numbers))}"


def _add_blocks(
    branch: Tree,
    leaves: Sequence[Leaf],
    trained: Mapping[str, Sequence[Leaf]],
    blocks: Sequence[str],
    filled: Sequence[int],
) -> None:
    """A line for each run of neighbouring blocks of the same size, below it one for each kind.

    Args:
      branch: of the group.
      leaves: of the group.
      trained: by path, the leaf in each phase in which it trains.
      blocks: names of all.
      filled: indices of those that hold parameters.
    """
    by_block: dict[int, dict[str, list[Leaf]]] = {}
    for leaf in leaves:
        kinds = by_block.setdefault(leaf["block_index"], {})
        kinds.setdefault(leaf["kind"], []).append(leaf)
    sizes = {
        block: {kind: plan_rows.parameters(here) for kind, here in kinds.items()}
        for block, kinds in by_block.items()
    }
    for run in plan_rows.runs(by_block, filled, sizes):
        kinds = {
            kind: [leaf for block in run for leaf in by_block[block][kind]]
            for kind in by_block[run[0]]
        }
        depth = plan_rows.span(
            round(leaf["depth_fraction"], 2) for here in kinds.values() for leaf in here
        )
        lines = []
        for kind, here in sorted(kinds.items()):
            rows = [row for leaf in here for row in trained[leaf["path"]]]
            biases = kind != "bias" and all("bias" in leaf["kinds"] for leaf in here)
            size = f"{plan_rows.parameters(here):,}"
            lines.append(f"{kind}{' biases' if biases else ''} {size}{_rates(rows)}")
        many = f" ({len(run)} blocks)" if len(run) > 1 else ""
        title = f"{_run_name(run, blocks)}{many} [{depth}]: "
        if len(lines) == 1:
            branch.add(Text(title + lines[0]))
        else:
            total = sum(map(plan_rows.parameters, kinds.values()))
            node = branch.add(Text(f"{title}{total:,}"))
            for line in lines:
                node.add(Text(line))


def _rates(rows: Sequence[Leaf]) -> str:
    """Multiplier, decay and pull of leaves that train."""
    if not rows:
        return ""
    text = f", rate × {plan_rows.span(row['learning_rate_multiplier'] for row in rows)}"
    for field, word in (("weight_decay", "decay"), ("pull_toward_start", "pull")):
        if values := [row[field] for row in rows if row[field]]:
            text += f", {word} {plan_rows.span(values)}"
    return text


def _what_would_run(plan: Mapping[str, Any]) -> Table:
    """Data, length and schedule."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def say(name: str, text: str) -> None:
        table.add_row(name, Text(text))

    data, steps = plan["data"], plan["epochs"] * plan["steps_per_epoch"]
    say("data", f"{data['source']}, {data['classes']:,} classes")
    for role, split in data["splits"].items():
        say(role, f"{split['examples']:,} examples ({split['split']})")
    say(
        "training",
        f"{_counted(plan['epochs'], 'epoch')} × {_counted(plan['steps_per_epoch'], 'step')} of "
        f"{_counted(plan['batch_size'], 'example')} = {_counted(steps, 'step')}",
    )
    phases = plan["phases"]
    schedules = [_schedule(phase) for phase in phases]
    if plan["one_schedule"] and len(phases) > 1:
        schedules = [f"{schedule}, over all phases" for schedule in schedules]
        schedules = schedules[:1] if len(set(schedules)) == 1 else schedules
    for number, schedule in enumerate(schedules, start=1):
        say(f"phase {number}" if len(schedules) > 1 else "schedule", schedule)
    if adapters := plan["adapters"]:
        say(
            "adapters",
            f"rank {adapters['rank']}, alpha {adapters['alpha']:g}, dropout "
            f"{adapters['dropout']:g}, at {', '.join(adapters['targets'])}",
        )
    if mixed := plan["interpolate"]:
        say(
            "afterwards",
            f"weights between phase 1 (0) and phase {len(phases)} (1) are evaluated at "
            + ", ".join(f"{coefficient:g}" for coefficient in mixed),
        )
    return table


def _schedule(phase: Mapping[str, Any]) -> str:
    end = "" if phase["schedule"] == "constant" else " to 0"
    warmup, clip = phase["warmup_steps"], phase["gradient_clip_norm"]
    return (
        f"{phase['optimizer']}, learning rate {phase['learning_rate']:.4g}{end} "
        f"({phase['schedule']}), "
        + (f"warm-up of {warmup:,} step{'s' * (warmup != 1)}" if warmup else "no warm-up")
        + (f", gradient clipped at norm {clip:g}" if clip else "")
    )
