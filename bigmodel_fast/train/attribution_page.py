"""The HTML page of attributions: one file, no script from elsewhere, all text escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STRONGEST = 5  # words listed for and against
STYLE = """
:root { --ink: #1d2430; --soft: #5d6878; --line: #dfe4ea; --paper: #ffffff; --back: #f4f6f8; --for: 20, 120, 190;
  --against: 214, 96, 30; --wrong: #b3261e; --right: #1b7a3d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a4b5; --line: #2c3542; --paper: #171d26;
  --back: #0f141b; --for: 70, 160, 235; --against: 235, 130, 60; --wrong: #ff8a80; --right: #7bd89a; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2.5rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 54rem; margin: 0 auto; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; padding: 0; list-style: none; }
.figures li { background: var(--paper); border: 1px solid var(--line); border-radius: .6rem; padding: .5rem .9rem; }
.figures b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.legend span, .word { padding: .1em .12em; border-radius: .25em; }
article { background: var(--paper); border: 1px solid var(--line); border-radius: .8rem; padding: 1rem 1.25rem;
  margin: 1rem 0; }
header { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: baseline; font-size: .92rem; }
.verdict { font-weight: 650; }
.wrong .verdict { color: var(--wrong); } .right .verdict { color: var(--right); }
.where { margin-left: auto; overflow-wrap: anywhere; }
.text { margin: .7rem 0; font-size: 1.06rem; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; padding-right: .9rem; vertical-align: top; white-space: nowrap; }
td { color: var(--soft); }
nav { margin: 1.25rem 0 0; } nav label { margin-right: 1.1rem; cursor: pointer; }
body:has(#mistakes:checked) .right, body:has(#correct:checked) .wrong { display: none; }
@media print { nav { display: none; } article { break-inside: avoid; } body { background: none; } }
"""


def page(explained: Sequence[Any], metrics: Mapping[str, float], model: str, examples: int) -> str:
    """The page.

    Args:
        explained: `Explanation`s.
        metrics: figures of all examples, by name.
        model: where it is from.
        examples: how many were measured.
    """
    figures = "".join(f"<li><b>{value:.4f}</b>{escape(name)}</li>" for name, value in metrics.items())
    wrong = sum(e.label != e.predicted for e in explained)
    articles = "\n".join(_article(e) for e in explained)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attributions of {escape(model)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>What {escape(model)} went by</h1>
<p class="soft">{len(explained)} of {examples:,} examples, {wrong} of them mistakes; the surest mistakes come first.</p>
<ul class="figures">{figures}</ul>
<p class="legend">A word on <span style="{_colour(0.55)}">blue</span> speaks for the class that the model chose, one on
<span style="{_colour(-0.55)}">orange</span> against it; the deeper the colour, the more. The number of a word (shown
when you point at it) is its integrated gradient: its share of how much higher the class's logit is for this text than
for padding alone.</p>
<nav aria-label="Which examples to show">
<label><input type="radio" name="show" id="all" checked> all</label>
<label><input type="radio" name="show" id="mistakes"> mistakes</label>
<label><input type="radio" name="show" id="correct"> right ones</label>
</nav>
{articles}
</main>
</body>
</html>
"""


def _article(e: Any) -> str:
    right = e.label == e.predicted
    verdict = f"{e.predicted}" if right else f"{e.predicted}, but it is {e.label}"
    most = max((abs(w.share) for w in e.words if w.share is not None), default=0.0) or 1.0
    text = "".join(_word(w, most) for w in e.words)
    strong = sorted((w for w in e.words if w.share), key=lambda w: -abs(w.share))
    speak_for = [w for w in strong if w.share > 0][:STRONGEST]
    against = [w for w in strong if w.share < 0][:STRONGEST]
    return f"""<article class="{"right" if right else "wrong"}">
<header><span class="verdict">{escape(verdict)}</span><span>{e.probability:.1%} sure</span>
<span class="where soft">{escape(e.where)}</span></header>
<div class="text">{text}</div>
<table>
<tr><th>for {escape(e.predicted)}</th><td>{_listed(speak_for)}</td></tr>
<tr><th>against</th><td>{_listed(against)}</td></tr>
<tr><th>logit</th><td>{e.total:+.3f} over padding alone; special tokens {e.special:+.3f},
not explained {e.gap:+.3f}</td></tr>
</table>
</article>"""


def _word(word: Any, most: float) -> str:
    if word.share is None:
        return escape(word.text)
    return (
        f'<span class="word" style="{_colour(word.share / most * 0.75)}" title="{word.share:+.4f}">'
        f"{escape(word.text)}</span>"
    )


def _colour(share: float) -> str:
    return f"background: rgba(var(--{'for' if share >= 0 else 'against'}), {abs(share):.2f})"


def _listed(words: Sequence[Any]) -> str:
    return ", ".join(f"{escape(w.text)} ({w.share:+.3f})" for w in words) or "nothing"
