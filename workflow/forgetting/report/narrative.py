"""The result in a few sentences, each supported by the tables."""

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

METRIC_SUBSTITUTES = "last"
"""Status of a checkpoint of a run that never reaches the threshold."""

REACHED = {"selected", "late", "first_above", "base_above"}
"""Statuses of runs that reach it, whether there is a checkpoint before that or not."""

UNEQUAL_LEARNING = 0.25
"""Difference in what was learnt beyond which it is not told who keeps more."""

LARGE_DIFFERENCE = 0.1
"""By so much more than recall F1 falls where it is told."""


def narrative(tables: ReportTables) -> tuple[list[str], list[str]]:
    """What was found, and what qualifies it."""
    base, *tuned = summary(tables)
    found = [line for line in tuned if line.steps and line.cells]
    old = [name for name in frames.probes_in_order(tables, "old") if is_known(base, name)]
    said = [_comparison_point(tables, tuned, found)]
    if len(found) > 1:
        ranked, learnt = _rankable_methods(tables, found)
        said += [_compare_pair(tables, name, ranked, base) for name in old]
        said.append(learnt)
    elif found:
        said += [_single_method(name, found[0], base) for name in old]
    said.append(_overlong_answers(tables, found, base))
    if found:
        said += [*unknown_probes(tables, base), unknown_benchmarks(tables)]
    qualified = [
        f"{_capital(line.name)} has no selected checkpoint: {_sentence(line.reason)}"
        for line in tuned
        if not line.steps
    ]
    qualified += [
        f"{_capital(line.name)} stands apart: {_sentence(line.reason)}"
        for line in found
        if set(line.statuses) - {"selected", "not_reached", METRIC_SUBSTITUTES}
    ]
    if any(line.seeds > 1 for line in found):
        qualified.append("Values and interval bounds are means over seeds.")
    if tables.rouge_tokenizer != "rouge_score":
        qualified.append(
            f"ROUGE is computed with the tokenizer {tables.rouge_tokenizer}, not as published."
        )
    return [sentence for sentence in said if sentence], qualified


def _comparison_point(
    tables: ReportTables, tuned: list[SummaryRow], found: list[SummaryRow]
) -> str:
    """At which checkpoints the methods are compared, by what became of their runs."""
    rule = tables.config.get("selection", {})
    what = metric_words(rule.get("metric", frames.ROUGE))
    probe = frames.humanize(str(rule.get("probe", "the new knowledge")))
    goal = rule.get("threshold")
    if not found:
        return f"No run has a checkpoint selected at {what} {goal} on {probe}: nothing to compare."
    stand_ins = [line for line in found if METRIC_SUBSTITUTES in line.statuses]
    if not any(REACHED & set(line.statuses) for line in tuned):
        each = "each stands at its" if len(found) > 1 else "what is shown is the"
        return f"No method reaches {what} {goal} on {probe}: {each} last checkpoint."
    if len(stand_ins) == len(found):
        each = "each stands at its" if len(found) > 1 else "it stands at its"
        none = _capital(_not_reaching(stand_ins))
        return f"{none} {what} {goal} on {probe}: {each} last checkpoint."
    said = f"Methods are compared at the last checkpoint before {what} on {probe} reaches {goal}"
    if not stand_ins:
        return f"{said}."
    return f"{said}; {_not_reaching(stand_ins)} it: there the last checkpoint stands in."


def _not_reaching(lines: list[SummaryRow]) -> str:
    """Names of the methods and seeds that do not arrive, and a verb."""
    names = []
    for line in lines:
        seeds = line.statuses.count(METRIC_SUBSTITUTES)
        some = f" (in {seeds} of {line.seeds} seeds)" if seeds < line.seeds else ""
        names.append(line.name + some)
    return f"{join_words(names)} never {'reaches' if len(names) == 1 else 'reach'}"


def _rankable_methods(
    tables: ReportTables, found: list[SummaryRow]
) -> tuple[list[SummaryRow], str]:
    """The methods whose retention may be compared, and how equal their learning is.

    Methods that reach the threshold are not compared with stand-ins, if there are two of them.
    """
    name = frames.watched_tasks(tables)
    arrived = [line for line in found if METRIC_SUBSTITUTES not in line.statuses]
    able = arrived if len(arrived) > 1 else found
    learnt = [line for line in able if name in line.cells]
    if name is None or len(learnt) < 2:
        return able, ""
    least, most = (end(learnt, key=lambda line: line.cells[name].value) for end in (min, max))
    low, high = least.cells[name].value, most.cells[name].value
    if f"{high:.2f}" == "0.00":
        return (
            [],
            f"None of the methods has learnt {frames.humanize(name)}: there is nothing to rank.",
        )
    apart = _is_separated(tables, name, learnt)
    if high - low > UNEQUAL_LEARNING or (apart and len(able) > len(arrived)):
        return [], (
            f"The methods have learnt {frames.humanize(name)} to between {low:.2f} "
            f"({least.name}) and {high:.2f} ({most.name}), too unequally to say which keeps "
            "more of the old: what learns less has less to forget."
        )
    said = (
        f"There the methods have learnt {frames.humanize(name)} to between {low:.2f} and {high:.2f}"
    )
    return able, f"{said}{apart}."


def _is_separated(tables: ReportTables, name: str, lines: list[SummaryRow]) -> str:
    """The two methods that have most surely not learnt the same, if any."""
    found = []
    for one, two in combinations(lines, 2):
        more, less = sorted((one, two), key=lambda line: line.cells[name].value, reverse=True)
        paired = frames.difference(tables, name, more.label, less.label)
        if paired is not None and paired["low"] > 0:
            found.append((paired["difference"], paired["low"], paired["high"], more, less))
    if not found:
        return ""
    difference, low, high, more, less = max(found, key=lambda one: one[0])
    return (
        f", which is not equal: {more.name} has {difference:.2f} more than {less.name} "
        f"({_number(low)} to {_number(high)} on the same questions), and may have forgotten more "
        "for that alone"
    )


def _compare_pair(
    tables: ReportTables, name: str, found: list[SummaryRow], base: SummaryRow
) -> str:
    """The methods that keep the most and the least of a probe, and how sure their order is."""
    able = [line for line in found if name in line.cells]
    if len(able) < 2:
        return ""
    most = max(able, key=lambda line: line.cells[name].value)
    least = min(able, key=lambda line: line.cells[name].value)
    first, second = most.cells[name], least.cells[name]
    said = (
        f"On {frames.humanize(name)}{_base_clause(name, base)}, {most.name} "
        f"{_retains(first)} most, {first.value:.2f} (95\u00a0% interval {first.interval}), and "
        f"{least.name} least, {second.value:.2f} ({second.interval})"
    )
    paired = frames.difference(tables, name, most.label, least.label)
    if paired is None:
        return f"{said}."
    verdict = "" if paired["low"] > 0 else ", which may be chance"
    return (
        f"{said}: on the same questions {paired['difference']:.2f} more "
        f"({_number(paired['low'])} to {_number(paired['high'])}){verdict}."
    )


def _single_method(name: str, one: SummaryRow, base: SummaryRow) -> str:
    cell = one.cells.get(name)
    if cell is None:
        return ""
    return (
        f"On {frames.humanize(name)}{_base_clause(name, base)}, {one.name} {_retains(cell)} "
        f"{cell.value:.2f} (95\u00a0% interval {cell.interval})."
    )


def _overlong_answers(tables: ReportTables, found: list[SummaryRow], base: SummaryRow) -> str:
    """Where F1 falls much further than recall: answers that begin right and do not end."""
    falls = [
        (recall.change - f1.change, line, name)
        for line in found
        for name in frames.probes_in_order(tables, "old")
        if (recall := line.cells.get(name)) and (f1 := line.f1.get(name))
        if recall.change is not None and f1.change is not None and name in base.f1
        if f1.change < -LARGE_DIFFERENCE and recall.change - f1.change > LARGE_DIFFERENCE
    ]
    if not falls:
        return ""
    _, worst, name = max(falls, key=lambda fall: fall[0])
    concerned = {line.label for _, line, _ in falls}
    who = f"{len(concerned)} of {len(found)} methods"
    who = "every method" if len(found) == len(concerned) > 1 else who
    who = f"with {who}, most with {worst.name}" if len(found) > 1 else f"with {worst.name}"
    before, after = _tokens(tables, name, "base"), _tokens(tables, name, worst.label)
    longer = after > before
    head = "Recall does not see that answers go on: F1" if longer else "F1"
    tail = f", at {after:.1f} tokens an answer against {before:.1f}" if longer else ""
    return (
        f"{head} falls much further than recall {who} on {frames.humanize(name)}, to "
        f"{worst.f1[name].value:.2f} from {base.f1[name].value:.2f} (recall to "
        f"{worst.cells[name].value:.2f} from {base.cells[name].value:.2f}){tail}."
    )


def _tokens(tables: ReportTables, name: str, label: str) -> float:
    """Mean length of a method's answers to a probe."""
    metric = "generated_tokens"
    rows = pd.concat(
        [frames.base_row(tables, metric, name), frames.at_selected(tables, metric, name)]
    )
    return float(rows[rows["label"] == label]["value"].mean())


def _retains(cell: SummaryCell) -> str:
    """What is above the base was not kept but gained."""
    return "has" if cell.change is not None and cell.change > 0 else "keeps"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212")


def _base_clause(name: str, base: SummaryRow) -> str:
    cell = base.cells.get(name)
    return "" if cell is None else f", where the base has {cell.value:.2f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    text = text.strip() or "the table of selections gives no reason"
    return text if text.endswith(".") else text + "."
