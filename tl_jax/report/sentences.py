"""The answers in sentences: who wins, by how much, how certain, at what cost, and what to mind."""

from collections.abc import Sequence

from tl_jax.report.answers import Answer, Answers, Standing
from tl_jax.report.cells import Setting
from tl_jax.report.statistics import BOTH, EXAMPLES, NONE, SEEDS, UNPAIRED, Difference
from tl_jax.report.words import (
    Name,
    Sentence,
    counted,
    interval,
    listed,
    percent,
    plain,
    points,
    scaled,
    seconds,
    short,
    times,
)

SPELT_OUT = 4  # more differences than these are summed up
FEW_SEEDS = 4


def headline(answers: Answers, answer: Answer) -> list[Sentence]:
    """The answer of one setting, a few sentences."""
    found = [_winner(answers, answer)]
    against = answer.against(answer.best.strategy)
    beaten = [d for d in against if d.certain and d.mean > 0]
    better = [d for d in against if d.certain and d.mean < 0]
    equal = [d for d in against if not d.certain]
    if beaten:
        found.append(_beaten(answers, beaten, all_others=not equal and not better))
    if better:
        gaps = listed([(Name(d.other), f" ({_gap(d)})") for d in better])
        found.append(("But on the seeds that both have it is beaten by ", *gaps, "."))
    if equal:
        found.append(_equal(answer, equal))
    found += _cost(answer)
    if (cheaper := _cheapest(answer, equal)) is not None:
        found.append(cheaper)
    return found


def _winner(answers: Answers, answer: Answer) -> Sentence:
    best = answer.best
    start: Sentence = ()
    if answer.setting.title:
        start = ("With ", Name(answer.setting.title), ": ")
    if len(answer.standings) == 1:
        return (
            *start,
            Name(best.strategy),
            " reaches ",
            _accuracy(best),
            "; it has no rival here.",
        )
    equal = [
        (Name(s.strategy),) for s in answer.standings[1:] if s.accuracy.mean == best.accuracy.mean
    ]
    if equal:
        names = listed([(Name(best.strategy),), *equal])
        return (*start, *names, " share the highest mean accuracy, ", _accuracy(best), ".")
    return (*start, Name(best.strategy), " has the highest mean accuracy, ", _accuracy(best), ".")


def _accuracy(standing: Standing) -> str:
    estimate = standing.accuracy
    between = interval(estimate.low, estimate.high)
    seeds = counted(estimate.seeds, "seed")
    if estimate.low is None:
        return f"{percent(estimate.mean)} ({seeds}, no interval)"
    return f"{percent(estimate.mean)} (95 % interval {between}; {seeds})"


def _gap(difference: Difference) -> str:
    if difference.source == UNPAIRED:
        return UNPAIRED
    if difference.low is None:
        return f"{points(difference.mean)} points, no interval"
    between = interval(difference.low, difference.high, differences=True)
    return f"{points(difference.mean)} points, {between}"


def _beaten(answers: Answers, beaten: Sequence[Difference], *, all_others: bool) -> Sentence:
    every = f"all {len(beaten)} others" if all_others else f"{len(beaten)} others"
    if len(beaten) <= SPELT_OUT:
        gaps = listed([(Name(d.other), f" ({_gap(d)})") for d in beaten])
        return ("It beats ", *gaps, ".")
    nearest = min(beaten, key=lambda d: d.mean)
    farthest = max(beaten, key=lambda d: d.mean)
    return (
        f"It beats {every}, from ",
        Name(nearest.other),
        f" ({_gap(nearest)}) to ",
        Name(farthest.other),
        f" ({_gap(farthest)}).",
    )


def _equal(answer: Answer, equal: Sequence[Difference]) -> Sentence:
    if len(equal) <= SPELT_OUT:
        gaps = listed([(Name(d.other), f" ({_gap(d)})") for d in equal], " or ")
    else:
        gaps = listed([(Name(d.other), f" ({points(d.mean)})") for d in equal], " or ")
    reason = ""
    if all(d.seeds == 1 and d.low is not None for d in equal):
        reason = ": one seed says nothing of how much seeds differ"
    elif all(d.source == UNPAIRED for d in equal):
        pass
    elif all(d.low is None for d in equal):
        reason = ": one seed and no record of which examples were right give no interval"
    return ("We cannot tell ", Name(answer.best.strategy), " from ", *gaps, f"{reason}.")


def _ratios(standing: Standing, reference: Standing) -> list[str]:
    found = []
    for column, words in (
        ("training_seconds", "the training time"),
        ("training_flops", "the FLOPs"),
        ("trainable_parameters", "the trainable parameters"),
    ):
        own, other = standing.means[column], reference.means[column]
        if own is not None and other:
            found.append(f"{times(own / other)} {words}")
    return found


def _cost(answer: Answer) -> list[Sentence]:
    best, reference = answer.best, answer.reference
    paid = [
        text
        for text, value in (
            (
                f"{seconds(best.means['training_seconds'])} of training",
                best.means["training_seconds"],
            ),
            (scaled(best.means["training_flops"], "FLOP"), best.means["training_flops"]),
            (
                f"{scaled(best.means['trainable_parameters'], '')} trainable parameters",
                best.means["trainable_parameters"],
            ),
        )
        if value is not None
    ]
    if not paid:
        return []
    cost = plain(listed([(text,) for text in paid]))
    ratios = plain(listed([(text,) for text in _ratios(best, reference)]))
    if best is reference or not ratios:
        return [("It cost ", cost, " a run.")]
    return [("It cost ", cost, " a run: ", ratios, " of ", Name(reference.strategy), ".")]


def _cheapest(answer: Answer, equal: Sequence[Difference]) -> Sentence | None:
    """The cheapest of those that cannot be told from the best."""
    price = answer.best.means["training_flops"]
    if price is None:
        return None
    rivals = [answer.standing(d.other) for d in equal if d.seeds > 1]
    priced = [(s.means["training_flops"], s) for s in rivals if s is not None]
    cheaper = [(cost, s) for cost, s in priced if cost is not None and cost < 0.9 * price]
    if not cheaper:
        return None
    _, standing = min(cheaper, key=lambda item: item[0])
    ratios = plain(listed([(text,) for text in _ratios(standing, answer.best)]))
    return (
        "The cheapest in FLOPs that we cannot tell from it is ",
        Name(standing.strategy),
        f": {ratios} of ",
        Name(answer.best.strategy),
        ".",
    )


def warnings(answers: Answers) -> list[Sentence]:
    """What must be seen before anything else."""
    found: list[Sentence] = []
    if broken := answers.broken:
        names = listed([(Name(cell.name),) for cell in broken])
        found.append(
            (
                f"BROKEN CERTIFICATE in {counted(len(broken), 'cell')}: ",
                *names,
                ". Parameters moved that were to stay frozen. Do not use these figures.",
            )
        )
    return found


def caveats(answers: Answers) -> list[Sentence]:
    """What limits the answers: seeds, missing cells, searches that ended at an edge."""
    found: list[Sentence] = []
    if unfinished := answers.unfinished:
        total = counted(len(answers.sweep.cells), "cell")
        failed = sum(cell.status == "failed" for cell in unfinished)
        found.append(
            (f"{len(unfinished)} of {total} without a result ({failed} failed); means and "
             "differences are over the seeds that are there.",)
        )  # fmt: skip
    if edges := _edges(answers):
        found.append(
            (
                "The learning rate of ",
                *edges,
                " was chosen at the edge of its grid: a better one may lie outside.",
            )
        )
    found += _unmatched(answers)
    if any(
        len({frozenset(c.seed for c in s.cells) for s in a.standings}) > 1 for a in answers.settings
    ):
        found.append(
            (f"Not all {answers.sweep.nouns} have the same seeds: means are over each one's own, "
             "differences over those that both have, so that the two may disagree.",)
        )  # fmt: skip
    if overflowed := [c for c in answers.sweep.cells if c.measures.get("not_finite")]:
        names = listed([(Name(cell.name),) for cell in overflowed])
        found.append(("Measures of ", *names, " overflowed and are left out."))
    estimates = [s.accuracy for answer in answers.settings for s in answer.standings]
    differences = [d for answer in answers.settings for d in answer.differences]
    if any(e.seeds == 1 and e.source == EXAMPLES for e in estimates):
        found.append(
            ("Where there is one seed, only test examples are resampled: variation between seeds "
             "is not in the intervals, and no difference counts as certain.",)
        )  # fmt: skip
    elif any(d.seeds == 1 for d in differences):
        found.append(
            ("A difference over one common seed does not count as certain, whatever its interval: "
             "one seed does not show how much such differences vary.",)
        )  # fmt: skip
    several = [e.seeds for e in estimates if 1 < e.seeds <= FEW_SEEDS]
    if several:
        most = f"{min(several)} to {max(several)}" if min(several) < max(several) else several[0]
        found.append(
            (f"Intervals over so few seeds ({most}) are rough: how much seeds differ is taken "
             f"from all {answers.sweep.nouns} of a setting together.",)
        )  # fmt: skip
    sources = {d.source for answer in answers.settings for d in answer.differences}
    sources |= {e.source for e in estimates}
    if SEEDS in sources:
        found.append(
            ("For some runs it is not recorded which examples were right: their intervals are "
             "from the spread between seeds alone.",)
        )  # fmt: skip
    if NONE in sources:
        found.append(
            ("Some runs have one seed and no record of which examples were right: their "
             "differences have no interval.",)
        )  # fmt: skip
    return found


def _unmatched(answers: Answers) -> list[Sentence]:
    """Settings in which one strategy chose from more than another."""
    found: dict[Sentence, list[str]] = {}
    for answer in answers.settings:
        if len(answer.tried) > 1:
            each = [
                (*listed([(Name(strategy),) for strategy in strategies]), f" chose from {number}")
                for number, strategies in answer.tried.items()
            ]
            found.setdefault(listed(each, ", "), []).append(answer.setting.title)
    return [
        (
            "Budgets are not matched",
            f" ({'; '.join(titles)})" if any(titles) else "",
            ": ",
            *said,
            " (learning rates × heads of a probe.grid).",
        )
        for said, titles in found.items()
    ]


def _edges(answers: Answers) -> Sentence:
    """Cells at an edge by strategy, with their setting, and their seeds where not all are meant."""
    edges: dict[tuple[str, Setting, float | None], list[str]] = {}
    for cell in answers.at_edge:
        which = cell.strategy, cell.setting, cell.numbers["learning_rate"]
        edges.setdefault(which, []).append(cell.seed)
    found: list[Sentence] = []
    for (strategy, setting, rate), seeds in edges.items():
        own = {
            cell.seed
            for cell in answers.sweep.cells
            if (cell.strategy, cell.setting) == (strategy, setting)
        }
        some = "with seed " if len(seeds) == 1 else "with seeds "
        some += plain(listed([(seed,) for seed in seeds]))
        words = filter(None, (setting.title, short(rate), some if set(seeds) != own else ""))
        found.append((Name(strategy), f" ({', '.join(words)})"))
    return listed(found)


def _times(ratio: float) -> str:
    digits = 2 if ratio < 0.995 else 1 if ratio < 99.95 else 0
    return f"{ratio:,.{digits}f} times"


def gradients(answers: Answers) -> list[Sentence]:
    """What an untrained head does to the trunk."""
    found: list[Sentence] = []
    for gradient in answers.gradients:
        where: Sentence = ()
        if gradient.setting.title:
            where = ("With ", Name(gradient.setting.title), ": ")
        article = "an" if where else "An"
        runs = counted(gradient.cells, "run")
        text = (
            f"{article} untrained head's gradients into the trunk are {_times(gradient.first)} "
            f"those of a trained head in the first step, and {_times(gradient.mean)} in the mean "
            f"of all steps measured (geometric means of {runs})."
        )
        found.append((*where, text))
    return found


def method(answers: Answers) -> list[Sentence]:
    """How the intervals were made, in plain words."""
    estimates = [s.accuracy for answer in answers.settings for s in answer.standings]
    examples = {
        int(count)
        for cell in answers.sweep.cells
        if cell.finished and (count := cell.numbers["examples"])
    }
    found: list[Sentence] = []
    if examples:
        between = " or ".join(f"{count:,}" for count in sorted(examples))
        found.append((f"Accuracy is the share of right answers on {between} test examples.",))
    if any(e.source in (BOTH, SEEDS) for e in estimates):
        found.append(
            ("An interval is a 95 % crossed bootstrap (Owen 2007, doi:10.1214/07-AOAS122): seeds "
             "and test examples are both drawn anew, 2,000 times. How much seeds differ is taken "
             f"for no less than the middle one over the {answers.sweep.nouns} of the setting, and "
             "Student's t allows for the number of seeds.",)
        )  # fmt: skip
    if any(e.source == EXAMPLES for e in estimates):
        found.append(("The interval of a single run is Wilson's.",))
    if any(answer.differences for answer in answers.settings):
        found.append(
            ("Differences are paired: the same seeds and the same examples for both. Their "
             "intervals hold for all pairs of a setting at once (max-|t|, Westfall and Young), so "
             "they are wider than a single comparison's. Where one contains 0 we say that we "
             "cannot tell.",)
        )  # fmt: skip
    found.append(
        ("Training counts what a frozen prefix makes of each image once where it is kept, and the "
         "steps: FLOPs by the least that they take, times as on this machine, without compiling. "
         "Validation counts in neither. What several runs share is charged to each.",)
    )  # fmt: skip
    return found
