"""The result of a study in a few sentences, each supported by the tables."""

from __future__ import annotations

from itertools import combinations

import pandas as pd

from forgetting.report import frames
from forgetting.report.frames import ReportTables
from forgetting.report.summary import (
    SummaryCell,
    SummaryRow,
    is_known,
    join_words,
    metric_words,
    summary,
    unknown_benchmarks,
    unknown_probes,
)

FALLBACK = "last"
"""Status of a selected checkpoint whose run never reaches the threshold."""

REACHED = {"selected", "late", "first_above", "base_above"}
"""Statuses of runs that reach the threshold, with or without a checkpoint before that."""

UNEQUAL_LEARNING = 0.25
"""Difference in what was learnt above which methods are not ranked by what they keep."""

LARGE_DIFFERENCE = 0.1
"""F1 must fall by this much, and by this much more than recall, to be reported."""


def narrative(tables: ReportTables) -> tuple[list[str], list[str]]:
    """Return the sentences of the answer, and those that qualify it."""
    base, *tuned = summary(tables)
    selected = [row for row in tuned if row.steps and row.cells]
    old = [name for name in frames.probes_in_order(tables, "old") if is_known(base, name)]
    answer = [_comparison_point(tables, tuned, selected)]
    if len(selected) > 1:
        rankable, learning = _rankable_methods(tables, selected)
        answer += [_compare_pair(tables, name, rankable, base) for name in old]
        answer += [_single_runs(tables) if rankable else "", learning]
    elif selected:
        answer += [_single_method(name, selected[0], base) for name in old]
    answer.append(_overlong_answers(tables, selected, base))
    if selected:
        answer += [*unknown_probes(tables, base), unknown_benchmarks(tables)]
    return [sentence for sentence in answer if sentence], _qualifications(tables, tuned, selected)


def _qualifications(
    tables: ReportTables, tuned: list[SummaryRow], selected: list[SummaryRow]
) -> list[str]:
    sentences = [
        f"{_capital(row.name)} has no selected checkpoint: {_sentence(row.reason)}"
        for row in tuned
        if not row.steps
    ]
    sentences += [
        f"{_capital(row.name)} is an exception: {_sentence(row.reason)}"
        for row in selected
        if set(row.statuses) - {"selected", "not_reached", FALLBACK}
    ]
    if any(row.seeds > 1 for row in selected):
        sentences.append("Values and interval bounds are means over seeds.")
    if tables.rouge_tokenizer != "rouge_score":
        sentences.append(
            f"ROUGE is computed with the tokenizer {tables.rouge_tokenizer}, not as published."
        )
    return sentences


def _comparison_point(
    tables: ReportTables, tuned: list[SummaryRow], selected: list[SummaryRow]
) -> str:
    """Return a sentence on the checkpoints at which the methods are compared."""
    rule = tables.config.get("selection", {})
    metric = metric_words(rule.get("metric", frames.ROUGE))
    probe = frames.humanize(str(rule.get("probe", "the new knowledge")))
    threshold = f"{metric} {rule.get('threshold')} on {probe}"
    if not selected:
        return f"No run has a checkpoint selected at {threshold}: nothing to compare."
    fallbacks = [row for row in selected if FALLBACK in row.statuses]
    if not any(REACHED & set(row.statuses) for row in tuned):
        return f"No method reaches {threshold}: {_last_checkpoints(selected)}."
    if len(fallbacks) == len(selected):
        return f"{_capital(_not_reaching(fallbacks))} {threshold}: {_last_checkpoints(selected)}."
    sentence = (
        f"Methods are compared at the last checkpoint before {metric} on {probe} reaches "
        f"{rule.get('threshold')}"
    )
    if not fallbacks:
        return f"{sentence}."
    compared = "is compared at its last checkpoint"
    if len(fallbacks) > 1:
        compared = "are compared at their last checkpoints"
    return f"{sentence}; {_not_reaching(fallbacks)} it and {compared}."


def _last_checkpoints(selected: list[SummaryRow]) -> str:
    if len(selected) > 1:
        return "all are compared at their last checkpoints"
    return "the last checkpoint is shown"


def _not_reaching(rows: list[SummaryRow]) -> str:
    """Return the names of methods and seeds that do not reach the threshold, and a verb."""
    names = []
    for row in rows:
        seeds = row.statuses.count(FALLBACK)
        some = f" (in {seeds} of {row.seeds} seeds)" if seeds < row.seeds else ""
        names.append(row.name + some)
    return f"{join_words(names)} never {'reaches' if len(names) == 1 else 'reach'}"


def _rankable_methods(
    tables: ReportTables, selected: list[SummaryRow]
) -> tuple[list[SummaryRow], str]:
    """Return the methods whose retention may be compared, and a sentence on their learning.

    If two methods or more reach the threshold, those that do not reach it are left out.
    """
    probe = frames.watched_probe(tables)
    reached = [row for row in selected if FALLBACK not in row.statuses]
    rankable = reached if len(reached) > 1 else selected
    learnt = [row for row in rankable if probe in row.cells]
    if probe is None or len(learnt) < 2:
        return rankable, ""
    least, most = (end(learnt, key=lambda row: row.cells[probe].value) for end in (min, max))
    low, high = least.cells[probe].value, most.cells[probe].value
    name = frames.humanize(probe)
    if f"{high:.2f}" == "0.00":
        return [], f"None of the methods has learnt {name}: there is nothing to rank."
    unequal = _unequal_learning(tables, probe, learnt)
    if high - low > UNEQUAL_LEARNING or (unequal and len(rankable) > len(reached)):
        return [], (
            f"The methods have learnt {name} to between {low:.2f} ({least.name}) and {high:.2f} "
            f"({most.name}), too unequally to say which keeps more of the old: what learns less "
            "has less to forget."
        )
    sentence = f"There the methods have learnt {name} to between {low:.2f} and {high:.2f}"
    return rankable, f"{sentence}{unequal}."


def _unequal_learning(tables: ReportTables, probe: str, rows: list[SummaryRow]) -> str:
    """Return a clause on the pair with the largest significant difference in learning, if any."""
    pairs = []
    for pair in combinations(rows, 2):
        more, less = sorted(pair, key=lambda row: row.cells[probe].value, reverse=True)
        paired = frames.difference(tables, probe, more.label, less.label)
        if paired is not None and paired["low"] > 0:
            pairs.append((paired["difference"], paired["low"], paired["high"], more, less))
    if not pairs:
        return ""
    difference, low, high, more, less = max(pairs, key=lambda pair: pair[0])
    return (
        f", which is not equal: {more.name} has {difference:.2f} more than {less.name} "
        f"({_number(low)} to {_number(high)} on the same questions), and may have forgotten more "
        "for that reason"
    )


def _compare_pair(
    tables: ReportTables, probe: str, rankable: list[SummaryRow], base: SummaryRow
) -> str:
    """Return a sentence on the methods that keep most and least, and whether chance explains it."""
    rows = [row for row in rankable if probe in row.cells]
    if len(rows) < 2:
        return ""
    most = max(rows, key=lambda row: row.cells[probe].value)
    least = min(rows, key=lambda row: row.cells[probe].value)
    first, second = most.cells[probe], least.cells[probe]
    sentence = (
        f"On {frames.humanize(probe)}{_base_clause(probe, base)}, {most.name} "
        f"{_retains(first)} most, {first.value:.2f} (95\u00a0% interval {first.interval}), and "
        f"{least.name} least, {second.value:.2f} ({second.interval})"
    )
    paired = frames.difference(tables, probe, most.label, least.label)
    if paired is None:
        return f"{sentence}."
    verdict = "" if paired["low"] > 0 else ", which may be chance"
    return (
        f"{sentence}: on the same questions {paired['difference']:.2f} more "
        f"({_number(paired['low'])} to {_number(paired['high'])}){verdict}."
    )


def _single_runs(tables: ReportTables) -> str:
    """Return a sentence if the intervals lack the noise of training."""
    if not (tables.comparisons["scope"] == "models").any():
        return ""
    return (
        "These are differences between single runs. Another seed may change their order, so they "
        "do not rank the methods."
    )


def _single_method(probe: str, row: SummaryRow, base: SummaryRow) -> str:
    cell = row.cells.get(probe)
    if cell is None:
        return ""
    return (
        f"On {frames.humanize(probe)}{_base_clause(probe, base)}, {row.name} {_retains(cell)} "
        f"{cell.value:.2f} (95\u00a0% interval {cell.interval})."
    )


def _overlong_answers(tables: ReportTables, selected: list[SummaryRow], base: SummaryRow) -> str:
    """Return a sentence on where F1 falls much more than recall: answers begin right and go on."""
    falls = [
        (recall.change - f1.change, row, probe)
        for row in selected
        for probe in frames.probes_in_order(tables, "old")
        if (recall := row.cells.get(probe)) and (f1 := row.f1.get(probe))
        if recall.change is not None and f1.change is not None and probe in base.f1
        if f1.change < -LARGE_DIFFERENCE and recall.change - f1.change > LARGE_DIFFERENCE
    ]
    if not falls:
        return ""
    _, worst, probe = max(falls, key=lambda fall: fall[0])
    labels = {row.label for _, row, _ in falls}
    methods = f"{len(labels)} of {len(selected)} methods"
    methods = "every method" if len(selected) == len(labels) > 1 else methods
    where = f"with {worst.name}"
    if len(selected) > 1:
        where = f"with {methods}, most with {worst.name}"
    before, after = (
        _answer_tokens(tables, probe, "base"),
        _answer_tokens(tables, probe, worst.label),
    )
    is_longer = after > before
    head = "Recall does not see that answers go on: F1" if is_longer else "F1"
    tail = f", at {after:.1f} tokens an answer against {before:.1f}" if is_longer else ""
    return (
        f"{head} falls much further than recall {where} on {frames.humanize(probe)}, to "
        f"{worst.f1[probe].value:.2f} from {base.f1[probe].value:.2f} (recall to "
        f"{worst.cells[probe].value:.2f} from {base.cells[probe].value:.2f}){tail}."
    )


def _answer_tokens(tables: ReportTables, probe: str, label: str) -> float:
    """Return the mean length of a method's answers to a probe."""
    metric = "generated_tokens"
    rows = pd.concat(
        [frames.base_row(tables, metric, probe), frames.at_selected(tables, metric, probe)]
    )
    return float(rows[rows["label"] == label]["value"].mean())


def _retains(cell: SummaryCell) -> str:
    """Return the verb for a value; a value above the base's was gained, not kept."""
    return "has" if cell.change is not None and cell.change > 0 else "keeps"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212")


def _base_clause(probe: str, base: SummaryRow) -> str:
    cell = base.cells.get(probe)
    return "" if cell is None else f", where the base has {cell.value:.2f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    text = text.strip() or "the table of selections gives no reason"
    return text if text.endswith(".") else text + "."
