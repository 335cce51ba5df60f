"""What the report says: numbers of a small sweep by hand, and its sentences."""

import numpy as np
import pytest
from report_examples import cell, full_sweep, hits, search, summary, sweep

from tl_jax.report import accuracy_charts, cells, charts, sections, sentences
from tl_jax.report import answers as answers_lib
from tl_jax.report.words import finite, plain, points


def found(results):
    return answers_lib.find(cells.read(results))


def said(results):
    return [" ".join(map(plain, p.sentences)) for p in sections.headlines(found(results))]


def pair(first, second, seeds=3, n=400, **fields):
    """A sweep of two strategies with independent hits."""
    made = []
    for strategy, share in (("a", first), ("b", second)):
        for seed in map(str, range(seeds)):
            right = hits(share, n, strategy, seed)
            made.append(
                cell(
                    {"strategy": strategy, "seed": seed},
                    share=float(np.mean(right)),
                    n=n,
                    hits=right,
                    **fields,
                )
            )
    return sweep(made)


def test_the_winner_is_said_with_its_numbers():
    (text, note) = said(pair(0.9, 0.6))
    assert text.startswith("a has the highest mean accuracy, 90.0 % (95 % interval ")
    assert "It beats b (+30.0 points, +" in text and "cannot tell" not in text
    assert "rough" in note


def test_what_cannot_be_told_apart_is_said():
    (text, _) = said(pair(0.805, 0.80))
    assert "We cannot tell a from b (+0.5 points, −" in text and "beats" not in text


def test_equal_cells_share_the_first_place():
    right = hits(0.8, 100, "both")
    made = [
        cell({"strategy": name, "seed": seed}, share=0.8, n=100, hits=right)
        for name in ("a", "b")
        for seed in "01"
    ]
    text = said(sweep(made))[0]
    assert text.startswith("a and b share the highest mean accuracy, 80.0 %")
    assert "We cannot tell a from b (0.0 points, 0.0 to 0.0)." in text


def test_costs_are_ratios_to_full():
    made = [
        cell({"strategy": "full"}, share=0.7, summary=summary(0.7, flops=4e9, parameters=400_000)),
        cell({"strategy": "lora"}, share=0.8, summary=summary(0.8, flops=1e9, parameters=4_000)),
    ]
    text = said(sweep(made))[0]
    assert (
        "It cost 10.4 s of training, 150 GFLOP and 4.00 K trainable parameters a run: "
        "1 × the training time, 0.25 × the FLOPs and 0.01 × the trainable parameters of full."
        in text
    )


def test_without_full_the_dearest_is_the_reference():
    made = [
        cell({"rate": name}, compared="rate", summary=summary(0.5, flops=flops))
        for name, flops in (("x", 1e9), ("y", 3e9), ("z", 2e9))
    ]
    answer = found(sweep(made, "rate")).settings[0]
    assert answer.reference.strategy == "y"


@pytest.mark.parametrize("seeds", ["012", "0"])
def test_the_cheapest_of_the_equals_is_named(seeds):
    """With one seed nothing can be told apart, which makes nobody an equal."""
    made = []
    for strategy, flops in (("dear", 4e9), ("cheap", 1e9), ("bad", 1e8)):
        for seed in seeds:
            share = {"dear": 0.805, "cheap": 0.8, "bad": 0.3}[strategy]
            made.append(
                cell(
                    {"strategy": strategy, "seed": seed},
                    hits=hits(share, 400, strategy, seed),
                    summary=summary(share, 400, flops=flops),
                )
            )
    text = said(sweep(made))[0]
    named = "The cheapest in FLOPs that we cannot tell from it is cheap: " in text
    assert named == (len(seeds) > 1)
    assert not named or ("0.25 × the FLOPs" in text and "of dear." in text)


def test_training_time_has_the_prefix_of_what_is_trained_on():
    one = cells.read(sweep([cell({"strategy": "a"}, summary=summary(0.5, seconds=3.0))])).cells[0]
    assert one.numbers["training_seconds"] == 3.0 + 0.5 - 0.125  # without the validation split's


def test_damaged_numbers_are_none():
    assert [finite(x) for x in (10**400, float("nan"), True, "1", 3)] == [None] * 4 + [3.0]
    assert charts.log_ticks([-5.0, 10.0])  # and of these none is a place on a logarithmic axis


def test_what_is_near_nothing_has_its_sign():
    """Or an interval that leaves 0 out could not be told from one that does not."""
    assert [points(x) for x in (0.0004, -0.0004, 0.0, 1e-17)] == ["+0.0", "−0.0", "0.0", "0.0"]


def test_many_beaten_ones_are_summed_up():
    made = [
        cell(
            {"strategy": f"s{k}", "seed": seed},
            hits=hits(0.9 if k == 0 else 0.5 - 0.02 * k, 500, k, seed),
        )
        for k in range(8)
        for seed in "01"
    ]
    text = said(sweep(made))[0]
    assert "It beats all 7 others, from s1 (+42.0 points" in text
    assert "to s7 (+54.0 points" in text


def test_a_broken_certificate_comes_first():
    made = [
        cell({"strategy": "a"}, summary=summary(0.8, ok=False)),
        cell({"strategy": "b"}, summary=summary(0.7)),
    ]
    first = said(sweep(made))[0]
    assert first.startswith("BROKEN CERTIFICATE in 1 cell: a.")


def test_certificates_of_nothing_are_not_ok():
    assert (
        found(sweep([cell({"strategy": "full"}, summary=summary(0.8, leaves=0))]))
        .sweep.cells[0]
        .certificate
        == "n.a."
    )


def test_unfinished_cells_and_edges_are_said():
    note = said(full_sweep(n=100))[-1]
    assert "2 of 48 cells without a result (1 failed)" in note
    assert "The learning rate of bitfit (examples_per_class = 10, 0.03)" in note
    assert "chosen at the edge of its grid" in note


def gridded(values, chosen, rates):
    grid = [{"learning_rate": rate, "weight_decay": 0.0, "input": "mean"} for rate in rates]
    one = cell(values, summary=summary(0.8))
    if rates:
        one["summary"]["probe"] = {"settings": grid, "chosen": grid[rates.index(chosen)]}
    return one | {"learning_rate": chosen}


def test_a_grid_of_heads_has_an_edge_and_a_budget():
    three = (0.1, 0.2, 0.3)
    cells = [gridded({"strategy": "a"}, 0.2, three), gridded({"strategy": "b"}, 0.3, three)]
    note = said(sweep(cells))[-1]
    assert "The learning rate of b (0.3) was chosen at the edge of its grid" in note
    assert "Budgets" not in note
    seeds = ((0.2, "0"), (0.3, "1"), (0.1, "2"), (0.1, "3"))  # each has a grid of its own
    cells = [gridded({"strategy": "a", "seed": seed}, rate, three) for rate, seed in seeds]
    edges = "a (0.3, with seed 1) and a (0.1, with seeds 2 and 3)"
    assert f"The learning rate of {edges} was chosen" in said(sweep(cells))[-1]
    cells = [gridded({"strategy": "a"}, 0.2, three)]
    cells += [gridded({"strategy": strategy}, 1.0, ()) for strategy in "bc"]
    note = said(sweep(cells))[-1]
    assert "edge" not in note
    assert "Budgets are not matched: b and c chose from 1, a chose from 3" in note


def test_budgets_are_matched_within_a_setting():
    made = {"plain": (), "grid": (0.1, 0.2, 0.3)}
    cells = [
        gridded({"strategy": strategy, "head": head}, 0.2, rates)
        for strategy in "ab"
        for head, rates in made.items()
    ]
    assert "Budgets" not in " ".join(said(sweep(cells)))
    cells[0]["search"] = search("a", 0.2, 0.8)
    note = said(sweep(cells))[-1]
    assert "Budgets are not matched (head = plain): b chose from 1, a chose from 4" in note


def test_one_seed_says_what_is_not_in_the_intervals():
    made = [cell({"strategy": s}, hits=hits(0.8, 100, s)) for s in "ab"]
    assert "variation between seeds is not in the intervals" in said(sweep(made))[-1]


def test_no_hits_say_so():
    made = [cell({"strategy": s, "seed": seed}) for s in "ab" for seed in "012"]
    assert "from the spread between seeds alone" in said(sweep(made))[-1]
    one = said(sweep([cell({"strategy": s}, share=x) for s, x in (("a", 0.8), ("b", 0.5))]))
    assert "no interval" in one[0] and "no record of which examples were right" in one[0]


def test_nothing_finished():
    made = [cell({"strategy": s}, status="missing") for s in "ab"]
    assert said(sweep(made))[0] == "No cell has a result yet."


def test_one_strategy_has_no_rival():
    assert "it has no rival here" in said(sweep([cell({"strategy": "a"})]))[0]


def test_gradients_in_a_sentence():
    (first, second) = sentences.gradients(found(full_sweep(n=50)))
    expected = (
        "With examples_per_class = 10: an untrained head's gradients into the trunk are 8.0 times "
        "those of a trained head in the first step, and 8.0 times in the mean of all steps measured"
    )
    assert plain(first).startswith(expected)
    assert plain(second).startswith("With examples_per_class = 100")


def test_the_trunks_norm_leaves_the_head_out():
    rows = [
        {"block": "stem", "norms": [3.0, 6.0]},
        {"block": "layer", "norms": [4.0, 8.0]},
        {"block": "head", "norms": [100.0, 100.0]},
    ]
    assert answers_lib.trunk_norms(rows) == pytest.approx([5.0, 10.0])
    assert answers_lib.trunk_norms([{"block": "stem", "norms": [None]}]) is None


def test_the_front():
    assert answers_lib.pareto_front([(1, 0.5), (2, 0.4), (3, 0.9), (None, 1.0), (3, 0.8)]) == [0, 2]
    assert answers_lib.pareto_front([(1, 0.5), (1, 0.5)]) == [0]


def test_numbers_of_a_cell():
    one = cells.read(full_sweep(n=100)).cells[0]
    assert one.numbers["training_flops"] == 150 * one.numbers["flops_per_step"]
    assert one.numbers["forgetting"] == 0 and one.numbers["drift_weights"] == 0
    shifts = [row["accuracy"] for row in one.measures["shifts"]]
    assert one.numbers["shifted_accuracy"] == pytest.approx(np.mean(shifts))


def test_an_accuracy_of_nothing_is_one():
    one = cell({"strategy": "a"}, measures={"clean": {"accuracy": 0.0}})
    [read] = cells.read(sweep([one])).cells
    assert read.numbers["clean_accuracy"] == 0.0


def test_settings_are_the_other_axes_in_their_order():
    results = full_sweep(n=50)
    titles = [setting.title for setting in cells.read(results).settings]
    assert titles == ["examples_per_class = 10", "examples_per_class = 100"]


def test_sections_without_data_are_left_out():
    small = found(sweep([cell({"strategy": s}, plan=None) for s in "ab"]))
    assert [s.key for s in sections.find(small)] == [
        "strategies", "pairs", "cost", "cells", "method",
    ]  # fmt: skip
    assert [s.key for s in sections.find(found(full_sweep(n=50)))] == [
        "strategies", "pairs", "cost", "axes", "robustness", "drift", "gradients", "curves",
        "forgetting", "search", "plans", "cells", "method",
    ]  # fmt: skip


def test_charts_hold_the_same_numbers():
    answers = found(full_sweep(n=100))
    best = answers.settings[0].best
    chart = accuracy_charts.accuracy(answers)
    (first, *_) = chart.panels[0].series
    assert first.name == best.strategy
    assert first.points == [(100 * best.accuracy.mean, 0.0)]
    along = accuracy_charts.along(answers, "data.examples_per_class", "examples")
    assert [x for x, _ in along.panels[0].series[0].points] == [10, 100]
    assert along.panels[0].x.log


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([30, 600], {50, 100, 200, 500}), ([1e-4, 1.0], {1e-4, 1e-3, 1e-2, 0.1, 1}), ([5, 5], {5})],
)
def test_log_axes_have_round_ticks(values, ticks):
    inside = {t for t in charts.log_ticks(values) if min(values) <= t <= max(values)}
    assert inside == ticks
