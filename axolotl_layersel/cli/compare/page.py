"""The report of a comparison: one HTML file that opens without network, and its pictures as PNG and SVG."""

import html
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from axolotl_layersel.cli.compare.answer import (
    answer,
    format_figure,
    format_interval,
    format_loss,
    format_rate,
    format_share,
    list_metrics,
    show_choosing,
    show_forgetting,
    show_interval,
    show_mean,
    show_standing,
)
from axolotl_layersel.cli.compare.cells import PAGE, PICTURES
from axolotl_layersel.cli.compare.figures import RANDOM, Comparison, Figures
from axolotl_layersel.cli.compare.pictures import Picture, list_pictures
from axolotl_layersel.cli.compare.summary import ArmSummary, Summary, summarise
from axolotl_layersel.common.errors import warning_instead
from axolotl_layersel.common.files import write_atomically
from axolotl_layersel.common.paths import PICTURE_ENDINGS
from axolotl_layersel.common.progress import format_duration
from axolotl_layersel.common.sizes import format_bytes
from axolotl_layersel.common.terminal import clean
from axolotl_layersel.reports.pictures import INSTALL, has_matplotlib, write_figure

LOG = logging.getLogger("axolotl.layersel")

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6067; --line: #d9dce1; --paper: #ffffff; --tint: #f3f5f8;
  --good: #00704f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a0a6ae; --line: #3a3f46; --paper: #16181b;
  --tint: #212429; --good: #5fd0a5; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.answer { background: var(--tint); border-left: 4px solid var(--good); border-radius: 4px; padding: .9rem 1.1rem;
  margin: 1rem 0; max-width: 50rem; }
.answer p { margin: 0; } .answer p + p { margin-top: .6rem; }
.answer p:first-child { font-weight: 600; font-size: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tr.best td { font-weight: 600; background: var(--tint); }
.better { color: var(--good); } .worse, .failed { color: var(--bad); }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; display: block; }
figure svg text { fill: currentColor; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem 2rem; }
.pictures figure { overflow-x: auto; } .pictures svg { min-width: 32rem; }
.grids { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
.grids figure { max-width: 100%; } .grids figcaption { contain: inline-size; }
.grids svg { background: #ffffff; color: #1c1e21; }
a { color: inherit; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .925rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { body { padding: 1rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { body { max-width: none; } .scroll { overflow: visible; } }
"""


def write_page(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the report of a comparison to a folder, and return the paths of its files, the page first.

    A picture that cannot be drawn is missing, which is one warning.

    Raises:
        LayerselError: if the page cannot be written.
    """
    summary = summarise(comparison)
    drawn = draw_pictures(list_pictures(comparison, summary), folder / PICTURES)
    page = folder / PAGE
    write_atomically(page, format_page(comparison, summary, drawn).encode("utf-8"))
    return [page, *(path.with_suffix(ending) for _, path in drawn for ending in PICTURE_ENDINGS)]


def draw_pictures(pictures: Sequence[Picture], folder: Path) -> list[tuple[Picture, Path]]:
    """Draw pictures to a folder, and return those that could be drawn with the paths of their SVG files.

    Pictures of an earlier report in the folder are removed.
    """
    drawn: list[tuple[Picture, Path]] = []
    with warning_instead("not all pictures of the comparison can be drawn", "The report lacks them."):
        for path in folder.glob("*") if folder.is_dir() else ():
            if path.suffix in PICTURE_ENDINGS:
                path.unlink()
        if pictures and not has_matplotlib():
            LOG.info("layersel: the report has no pictures, because matplotlib is not installed: %s.", INSTALL)
            return []
        for picture in pictures:
            path = folder / f"{picture.name}.svg"
            write_figure(picture.make, [path.with_suffix(ending) for ending in PICTURE_ENDINGS])
            drawn.append((picture, path))
    return drawn


# --- The page ---------------------------------------------------------------------------------------------------------


def format_page(comparison: Comparison, summary: Summary, drawn: Sequence[tuple[Picture, Path]]) -> str:
    """Return the page as HTML; ``drawn`` are the pictures with their SVG files."""
    name = Path(comparison.settings.yaml).name
    found = answer(comparison)
    charts = [format_picture(each, path) for each, path in drawn if not each.name.startswith("ranks")]
    grids = [format_picture(each, path) for each, path in drawn if each.name.startswith("ranks")]
    parts = [
        f"<h1>{escape(name)}: which adapter pays</h1>",
        f'<p class="soft">{escape(describe_size(comparison))}</p>',
        format_answer(found.sentences),
        *([list_items("Notes", found.remarks)] if found.remarks else []),
        "<h2>Losses</h2>",
        format_losses(summary),
        '<p class="soft">Test losses are means over seeds, each arm at its best learning rate. Differences are in per '
        "cent of plain LoRA’s loss, with the 95 % interval of each. An arm is marked as better or worse only if an "
        "interval that holds for all comparisons together leaves out 0.</p>",
        "<h2>Costs</h2>",
        format_costs(summary),
        f'<p class="soft">{escape(describe_costs(summary))}</p>',
    ]
    if charts:
        parts += ["<h2>Curves</h2>", '<div class="pictures">', *charts, "</div>"]
    if grids:
        parts += ["<h2>Chosen layers and ranks</h2>", '<div class="grids">', *grids, "</div>"]
    if summary.arms and not drawn:
        parts.append(f'<p class="soft">Pictures need matplotlib: <code>{escape(INSTALL)}</code>.</p>')
    parts += ["<h2>What was compared</h2>", format_facts(list_facts(comparison))]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: comparison of adapters</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def describe_size(comparison: Comparison) -> str:
    """Return how much was compared, in a line."""
    settings = comparison.settings
    seeds = "1 seed" if len(settings.seeds) == 1 else f"{len(settings.seeds)} seeds"
    return f"{len(settings.arms)} arms, {seeds}, {settings.steps:,} steps; {len(comparison.cells)} runs"


def describe_costs(summary: Summary) -> str:
    """Return what the columns of costs are."""
    kinds = {cell.memory_of for arm in summary.arms.values() for cell in arm.cells.values()}
    memory = "of the accelerator" if kinds == {"device"} else "of the process"
    text = f"Peak memory is that {memory}, for the process with the most."
    if summary.equal_seconds is not None:
        text += (
            f" The loss at {format_duration(summary.equal_seconds)} is the validation loss of each arm after as much "
            "time as the fastest run took with its choice of layers, from its curve."
        )
    return text


def format_answer(sentences: Sequence[str]) -> str:
    """Return the answer, with its first sentence on a line of its own."""
    first, rest = sentences[0], " ".join(sentences[1:])
    return (
        f'<div class="answer"><p>{format_text(first)}</p>' + (f"<p>{format_text(rest)}</p>" if rest else "") + "</div>"
    )


def list_items(heading: str, items: Iterable[str]) -> str:
    """Return a heading and a list."""
    return f"<h2>{heading}</h2>\n<ul>" + "".join(f"<li>{format_text(item)}</li>" for item in items) + "</ul>"


def format_losses(summary: Summary) -> str:
    """Return the table of losses."""
    has_random = RANDOM in summary.arms and any(
        each.judgement and each.judgement.to_random for each in list_arms(summary)
    )
    rows = []
    for arm in list_arms(summary):
        standing = show_standing(arm)
        cells = [
            name_cell(arm),
            format_rate(arm.rate),
            str(len(arm.cells)),
            format_loss(arm.test_loss),
            set_minus(show_mean(arm)),
            set_minus(show_interval(arm)),
        ]
        cells += [show_to_random(arm)] if has_random else []
        word = f'<span class="{standing.replace(" ", "-")}">{escape(standing)}</span>' if standing else ""
        rows.append((arm.arm == summary.best, [*cells, word]))
    headings = ["arm", "rate", "seeds", "test loss", "to plain LoRA", "95 % interval"]
    headings += ["to a random choice"] if has_random else []
    return format_table([*headings, "finding"], rows)


def format_costs(summary: Summary) -> str:
    """Return the table of costs."""
    forgets = any(arm.forgetting for arm in list_arms(summary))
    metrics = list_metrics(summary)
    headings = ["arm", "parameters", "s a step", "choosing", "training", "peak memory", "adapter"]
    if summary.equal_seconds is not None:
        headings.append(f"loss at {format_duration(summary.equal_seconds)}")
    headings += ["rise on general text"] if forgets else []
    rows = []
    for arm in list_arms(summary):
        cost = arm.costs
        cells = [
            name_cell(arm),
            f"{cost.parameters:,.0f}" if cost else "-",
            format_figure(cost.seconds_per_step) if cost else "-",
            show_choosing(arm),
            format_duration(cost.seconds_training) if cost else "-",
            format_bytes(cost.peak_memory_bytes) if cost else "-",
            format_bytes(cost.adapter_bytes) if cost else "-",
        ]
        cells += [format_loss(arm.equal_time_loss)] if summary.equal_seconds is not None else []
        cells += [set_minus(show_forgetting(arm))] if forgets else []
        cells += [f"{arm.metrics[name]:.4g}" if name in arm.metrics else "-" for name in metrics]
        rows.append((arm.arm == summary.best, cells))
    return format_table([*headings, *metrics], rows)


def list_arms(summary: Summary) -> list[ArmSummary]:
    """Return the arms in their order."""
    return list(summary.arms.values())


def name_cell(arm: ArmSummary) -> str:
    """Return the name of an arm as HTML."""
    return f"<code>{escape(arm.arm)}</code>"


def set_minus(text: str) -> str:
    """Return numbers with a real minus, which not every terminal has."""
    return re.sub(r"-(?=\d)", "−", text)


def show_to_random(arm: ArmSummary) -> str:
    """Return the difference of an arm to a random choice in words."""
    control = arm.judgement.to_random if arm.judgement else None
    if control is None:
        return ""
    return format_share(control) + (f" ({format_interval(control, 'interval')})" if control.interval else "")


def format_table(headings: Sequence[str], rows: Iterable[tuple[bool, Sequence[str]]]) -> str:
    """Return a table, which scrolls within the page; each row has a mark of the best, and cells as HTML."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f"<tr{' class=best' if best else ''}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
        for best, cells in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def list_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what the reader must know to judge a comparison, and to do it again."""
    settings = comparison.settings
    facts = [
        ("YAML file", settings.yaml),
        ("folder", settings.folder),
        ("steps", describe_steps(comparison)),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("learning rates at first", ", ".join(map(format_rate, settings.rates))),
        ("search for the rate", "the better half in full" if settings.halving else "all rates with all seeds in full"),
        ("held-out rows", settings.held_out),
    ]
    cell: Figures | None = next(iter(comparison.figures), None)
    if cell is not None:
        held_out = f"{cell.validation_rows:,} decide the rate, {cell.test_rows:,} decide between arms"
        rows = f"{cell.train_rows:,} train, {held_out}"
        processes = f"{cell.engine}, {cell.processes} process" + ("es" if cell.processes > 1 else "")
        facts += [("rows", rows), ("engine", processes)]
    if settings.general:
        facts.append(("general text", settings.general))
    if settings.launch:
        facts.append(("launched with", " ".join(settings.launch)))
    return facts


def describe_steps(comparison: Comparison) -> str:
    """Return the steps of a comparison and of the real run."""
    steps, real = comparison.settings.steps, comparison.real_steps
    return f"{steps:,} of the real run’s {real:,}" if real else f"{steps:,}"


def format_facts(facts: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and values."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts) + "</dl>"


def format_picture(picture: Picture, path: Path) -> str:
    """Return a picture within the page, with links to its files."""
    links = ", ".join(
        f'<a href="{PICTURES}/{escape(path.with_suffix(ending).name)}">{ending[1:].upper()}</a>'
        for ending in PICTURE_ENDINGS
    )
    return (
        f"<figure>{embed(path.read_text(encoding='utf-8'), picture)}"
        f"<figcaption>{escape(picture.alternative)} {links}</figcaption></figure>"
    )


def embed(svg: str, picture: Picture) -> str:
    """Return an SVG file of matplotlib as a part of a page, whose colour of text it takes.

    Its names are made distinct from those of the page's other pictures.
    """
    svg = svg[svg.index("<svg") :]
    prefix = f"{picture.name}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The white paper of the figure and of its axes is left to the page, and its black ink takes the page's colour.
    svg = re.sub(r"(?s)(<g id=\"[^\"]*patch_\d+\">\s*<path [^>]*?)fill: #ffffff", r"\1fill: none", svg)
    svg = re.sub(r"(fill|stroke): #(000000|595959)", r"\1: currentColor", svg)
    label = f'<svg role="img" aria-label="{escape(picture.title)}. {escape(picture.alternative)}" '
    return svg.replace("<svg ", label, 1)


def format_text(text: str) -> str:
    """Return a sentence as HTML, with what stands in backticks as code, and per cent on the line of their number."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text)).replace(" %", "&nbsp;%")


def escape(text: str) -> str:
    """Return text as HTML, on one line."""
    return html.escape(clean(text))
