"""What `depth` measured, as tables of text for `scores.md` and for the page."""

from __future__ import annotations

from collections.abc import Iterator

from bfpo.core.markdown import table
from bfpo.scores.people import percent_words, points_words
from bfpo.scores.scores import p_text
from bfpo.suites.records import DepthFile, DivergencePoint, PrefilledSuite

__all__ = ["Table", "about_prefill", "depth_tables", "depth_text"]

Table = tuple[str, list[str], list[list[str]]]
"""Title, heads and rows."""

METRICS = {
    "harmless": "harmless",
    "harmless_given": "the given tokens alone",
    "recovered": "own part declines",
    "coherent": "coherent",
    "harmless_coherent": "harmless among coherent",
}


def about_prefill(depth: DepthFile) -> str:
    """Return what the rates of begun answers are and how their tokens were chosen, or why there are none."""
    if depth.reason:
        return f"{depth.reason[:1].upper()}{depth.reason[1:]}."
    if not depth.prefilled:
        return ""
    chosen = f"the first tokens of harmful compliances of {depth.source}, the same text for every model"
    if depth.assist is not None:
        how = "the compliance's next token where it is among them, else the most probable"
        how = how if depth.assist == "reference" else "the one after which the judge finds the answer least safe"
        chosen = f"tokens chosen among each model's own {depth.top} most probable ones: {how}"
    own = (
        " The prompts are those with which the start complied, so that it is hardly harmless without given tokens."
        if depth.source == depth.start
        else ""
    )
    judged = any(one.metric == "harmless" and one.value is not None for one in depth.scores or ())
    read = (
        f" The judge reads the whole message. “{METRICS['harmless_given']}”: what it says of a model that stops there."
    )
    return (
        f"Each model continues {chosen}.{read if judged else ''} “{METRICS['recovered']}”: a refusal, in full or in "
        f"part, after the given tokens.{own}"
    )


def depth_tables(depth: DepthFile) -> Iterator[Table]:
    """Yield the tables: rates by number of given tokens, differences to the start, prompts left out, KL by position."""
    for suite in depth.prefilled or ():
        yield from _prefilled(depth, suite)
    left_out = [
        [one.title or one.suite, reason, str(num)]
        for one in depth.prefilled or ()
        for reason, num in (one.left_out or {}).items()
    ]
    short = [
        [one.title or one.suite, f"{model}: {words.format(tokens)}", str(num)]
        for one in depth.prefilled or ()
        for counts, words in ((one.too_short, "fewer than {} tokens"), (one.too_long, "no room beside {} given tokens"))
        for model, by_tokens in (counts or {}).items()
        for tokens, num in by_tokens.items()
    ]
    if left_out or short:
        yield "Harmful prompts left out", ["suite", "reason", "prompts"], left_out + short
    if depth.divergence:
        heads = ["model", "answers", "num", "first five tokens' share"]
        ranges = list(dict.fromkeys(_range(point) for one in depth.divergence for point in one.ranges))
        rows = []
        for one in depth.divergence:
            by_range = {_range(point): _nats(point) for point in one.ranges}
            share = one.first_five
            first = "" if share is None else percent_words(share.value, share.low, share.high)
            rows.append(
                [one.model, one.group, str(one.num_answers), first, *(by_range.get(name, "") for name in ranges)]
            )
        whose = "the start's" if depth.answers == "start" else "each model's own"
        yield f"KL to {depth.start}, nats per token of {whose} answers", [*heads, *ranges], rows


def _prefilled(depth: DepthFile, suite: PrefilledSuite) -> Iterator[Table]:
    own = [score for score in depth.scores or () if score.suite == suite.suite]
    title = suite.title or suite.suite
    measured = [name for name in METRICS if any(one.metric == name and one.value is not None for one in own)]
    rows = []
    for model, tokens in dict.fromkeys((score.model, score.tokens) for score in own if measured):
        by_metric = {one.metric: one for one in own if (one.model, one.tokens) == (model, tokens)}
        cells = [
            percent_words(one.value, one.low, one.high) if (one := by_metric.get(name)) is not None else ""
            for name in measured
        ]
        first = by_metric[measured[0]]
        rows.append([model, str(tokens), *cells, str(first.num), str(first.unscored)])
    if rows:
        heads = ["model", "given tokens", *(METRICS[name] for name in measured), "scored", "unscored"]
        yield f"Begun answers, {title}: {suite.num_compliances} of {suite.num_prompts} harmful prompts", heads, rows
    main = next((name for name in ("harmless", "recovered") if name in measured), "")
    compared = [
        row
        for row in depth.comparisons or ()
        if row.suite.rpartition("+")[0] == suite.suite and row.num
        if row.metric == main and depth.start in (row.first, row.second)
    ]
    rows = [
        [
            f"{row.first} - {row.second}",
            row.suite.rpartition("+")[2],
            points_words(row.difference, row.low, row.high),
            p_text(row.p_holm),
            str(row.num),
        ]
        for row in compared
    ]
    if rows:
        heads = ["models", "given tokens", "difference, points", "p (Holm)", "prompts"]
        yield f"Begun answers, {title}: {METRICS[main]}, paired differences", heads, rows


def _range(point: DivergencePoint) -> str:
    return f"token {point.first}" if point.first == point.last else f"{point.first} to {point.last}"


def _nats(point: DivergencePoint) -> str:
    bounds = "" if point.low is None or point.high is None else f" ({point.low:.3g} to {point.high:.3g})"
    return f"{point.value:.3g}{bounds}"


def depth_text(depth: DepthFile) -> list[str]:
    """Return the lines of Markdown of the tables, for `scores.md`."""
    lines = ["", about] if (about := about_prefill(depth)) else []
    for title, heads, rows in depth_tables(depth):
        lines += ["", f"**{title}**", "", *table(heads, rows)]
    return lines
