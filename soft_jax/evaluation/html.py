"""Pieces of HTML pages that are one file each: no script, nothing from a network.

A page follows the reader's light or dark setting, fits a phone, and can be printed. Heat maps are
tables, so that their numbers can be read aloud and copied; curves and trees are SVG. Colours are
those that colour-blind readers can tell apart: cividis, PuOr, and Okabe and Ito's for curves.

Whatever text comes in is escaped; what these functions return is `Markup`, which is not again.
"""

import base64
import functools
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.cluster.hierarchy
from PIL import Image

from soft_jax import __version__, paths
from soft_jax.errors import UserError
from soft_jax.store.files import write_text

FORMAT = 1  # of the pages, in their "generator"
MOST = 24  # rows and columns of a matrix; larger ones are shown as means over blocks
MOST_CURVES = 8
LONGEST_PLACE = 9  # letters of a place below a curve
MOST_MARKED = 60  # points of a curve that have a mark
MOST_LEAVES = 40  # of a tree; the most alike are joined in one leaf above that
_SHADES = 21  # of a heat map
_LONGEST = 14  # letters of a name in a heat map or a picture; the whole name is its title
_ONE_LINE = 36  # letters of a table's cell that are not broken into lines
_GENERATOR = f'<meta name="generator" content="soft_jax page {FORMAT}">'
_OURS = re.compile(r'<meta name="generator" content="soft_jax page \d+">')
# What can't stand in HTML, or moves what stands beside it: control characters, and those that turn
# the direction of writing round.
_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_MARKERS = ("●", "■", "▲", "◆", "○", "□", "△", "◇")


class Markup(str):
    """Text that is HTML already."""


class Section(NamedTuple):
    """A part of a page: its anchor, its heading, and what stands below it."""

    anchor: str
    heading: str
    body: Markup


def text(value: Any) -> Markup:
    """Return anything as HTML that shows it; `Markup` as it is."""
    if isinstance(value, Markup):
        return value
    shown = paths.shown(value) if isinstance(value, Path) else str(value)
    # A file name that is no UTF-8 has surrogates, which no file takes.
    shown = shown.encode("utf-8", "backslashreplace").decode()
    shown = _ODD.sub(lambda sign: f"\\x{ord(sign[0]):02x}", shown)
    return Markup(html.escape(shown, quote=True))


def joined(*parts: Any) -> Markup:
    """Join pieces, text among them, to one."""
    return Markup("\n".join(text(part) for part in parts if part != ""))


def paragraph(*sentences: Any, kind: str = "") -> Markup:
    """Return a paragraph; `kind` is its class, "note" for smaller print."""
    return Markup(f"<p{_class(kind)}>{' '.join(text(s) for s in sentences)}</p>")


def strong(value: Any) -> Markup:
    """Return text in bold."""
    return Markup(f"<strong>{text(value)}</strong>")


def number_of(value: float, form: str) -> str:
    """Return a number as `form` has it, with a minus sign, and no sign where it shows 0."""
    shown = form.format(value)
    return shown.lstrip("+-") if not shown.strip("+-0.%") else shown.replace("-", "−")


def heading(value: Any) -> Markup:
    """Return a heading inside a section."""
    return Markup(f"<h3>{text(value)}</h3>")


def folded(summary: Any, body: Markup, is_open: bool = False) -> Markup:
    """Return what is seen when its `summary` is clicked."""
    state = " open" if is_open else ""
    return Markup(f"<details{state}><summary>{text(summary)}</summary>\n{body}\n</details>")


def side_by_side(*parts: Markup, small: bool = False) -> Markup:
    """Return pieces beside each other, or below each other where there is no room.

    `small` ones need less.
    """
    cells = "\n".join(f'<div class="cell">{part}</div>' for part in parts)
    return Markup(f"<div{_class('grid', 'four' if small else '')}>\n{cells}\n</div>")


def facts(rows: Mapping[str, Any]) -> Markup:
    """Return a few figures with their names, in large print."""
    cells = (
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows.items()
    )
    return Markup(f'<dl class="facts">{"".join(cells)}</dl>')


def _class(*names: str) -> str:
    given = " ".join(name for name in names if name)
    return f' class="{given}"' if given else ""


def _short(name: Any, longest: int = _LONGEST) -> tuple[Markup, str]:
    """Return a name cut short, and the attribute that has the whole of it where it was cut.

    It is cut in the middle: names of many tasks often begin alike.
    """
    whole = str(name)
    if isinstance(name, Markup) or len(whole) <= longest:
        return text(name), ""
    end = (longest - 1) // 2
    return text(f"{whole[: longest - 1 - end]}…{whole[-end:]}"), f' title="{text(whole)}"'


# Tables.


def table(
    caption: str,
    columns: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    left: Sequence[int] = (0,),
    marked: Sequence[int] = (),
) -> Markup:
    """Return a table that scrolls in a box of its own where it is too wide.

    The first cell of a row names it. The columns `left` are aligned left, all others right; the
    rows `marked` stand out.
    """
    head = "".join(
        f'<th scope="col"{_class("" if i in left else "n")}>{text(column)}</th>'
        for i, column in enumerate(columns)
    )
    body = []
    for number, row in enumerate(rows):
        cells = "".join(
            f'<th scope="row">{text(cell)}</th>'
            if i == 0
            else f"<td{_class('' if i in left else 'n', _wide(cell))}>{text(cell)}</td>"
            for i, cell in enumerate(row)
        )
        body.append(f"<tr{_class('mark' if number in marked else '')}>{cells}</tr>")
    rows_ = "\n".join(body)
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows_}\n</tbody>"
    return _box(caption, f"<table>{inner}</table>")


def _wide(cell: Any) -> str:
    """Return the class of a cell whose text is broken into lines."""
    return "w" if not isinstance(cell, Markup) and len(str(cell)) > _ONE_LINE else ""


def _box(caption: str, table_: str, kind: str = "") -> Markup:
    """Return a table that scrolls by itself below its caption; the keyboard reaches it too.

    A caption inside it would be as wide as the table: out of sight, or in many lines.
    """
    label = text(caption)
    table_ = table_.replace("<table", f'<table aria-label="{label}"', 1)
    return Markup(
        f'<p class="caption" aria-hidden="true">{label}</p>\n'
        f'<div{_class("box", kind)} tabindex="0" role="region" aria-label="{label}">{table_}</div>'
    )


def heat_map(
    caption: str,
    rows: Sequence[Any],
    columns: Sequence[Any],
    values: np.ndarray,
    *,
    form: str = "{:.0f}",
    limits: tuple[float, float] | None = None,
    corner: str = "",
    unit: str = "",
) -> Markup:
    """Return a matrix `[rows, columns]` as a table with coloured cells; NaN is left blank.

    `limits` of the colours are those of the values where None. Where they are below and above 0,
    the colours part at 0. `corner` says what rows and columns are; `unit` what the numbers are.
    """
    values = np.asarray(values, float)
    found = values[np.isfinite(values)]
    low, high = limits or ((float(found.min()), float(found.max())) if found.size else (0.0, 1.0))
    parted = low < 0 < high
    if parted:
        low, high = min(low, -high), max(high, -low)
    # Narrow columns leave room for more of them.
    upright = any(len(str(column)) > 5 for column in columns)
    heads = []
    for column in columns:
        name, whole = _short(column)
        inner = f"<span>{name}</span>" if upright else name
        heads.append(f'<th scope="col"{_class("up" if upright else "")}{whole}>{inner}</th>')
    lines = []
    for row, line in zip(rows, values, strict=True):
        name, whole = _short(row, 24)
        cells = []
        for value in line:
            if not np.isfinite(value):
                cells.append("<td></td>")
                continue
            share = (value - low) / (high - low) if high > low else 0.0
            shade = round(min(max(share, 0.0), 1.0) * (_SHADES - 1))
            number = number_of(value, form)
            cells.append(f'<td class="{"d" if parted else "h"}{shade}">{number}</td>')
        lines.append(f'<tr><th scope="row"{whole}>{name}</th>{"".join(cells)}</tr>')
    body = "\n".join(lines)
    scale = (
        f'<p class="scale"><span>{number_of(low, form)}</span>'
        f'<span class="bar {"parted" if parted else ""}"></span>'
        f"<span>{number_of(high, form)}</span> {text(unit)}</p>"
    )
    made = (
        '<table class="heat">'
        f'<thead><tr><th scope="col" class="corner">{text(corner)}</th>'
        f"{''.join(heads)}</tr></thead>"
        f"\n<tbody>\n{body}\n</tbody></table>"
    )
    return Markup(f"{_box(caption, made, 'heats')}\n{scale}")


def in_blocks(
    names: Sequence[str], values: np.ndarray, shares: bool = False
) -> tuple[list[str], np.ndarray]:
    """Return a square matrix `[n, n]`, as it is or as means over blocks of neighbours.

    With more than `MOST` rows, as few neighbours as leave at most `MOST` blocks are joined; a block
    is named by its first and its last place, from 1. NaN counts in no mean. Of `shares`, which are
    parts of a row's whole, the columns of a block are added up.
    """
    most = MOST
    count = len(names)
    if count <= most:
        return list(names), values
    step = -(-count // most)
    starts = list(range(0, count, step))
    ends = [min(start + step, count) for start in starts]
    out = np.full((len(starts), len(starts)), np.nan)
    for i, (a, b) in enumerate(zip(starts, ends, strict=True)):
        for j, (c, d) in enumerate(zip(starts, ends, strict=True)):
            part = values[a:b, c:d]
            if np.isfinite(part).any():
                out[i, j] = np.nanmean(part) * (part.shape[1] if shares else 1)
    spans = zip(starts, ends, strict=True)
    return [f"{a + 1}–{b}" if b > a + 1 else str(b) for a, b in spans], out


# Pictures.


def curves(
    title: str,
    places: Sequence[Any],
    series: Mapping[str, Sequence[float | None]],
    y_label: str,
    dashed: Sequence[str] = (),
    hollow: Sequence[int] = (),
) -> Markup:
    """Return curves over `places`, in percent, with their names and last values below.

    A value that is None leaves a gap. The curves named in `dashed` are dashed; points at the places
    `hollow` are not filled, and no line leads to them.
    """
    width, top, bottom, left, right = 380, 12, 40, 34, 12
    height = 234
    given = [v for values in series.values() for v in values if v is not None]
    low = min(given, default=0.0)
    floor = max(0.0, 20 * np.floor((low - 1) / 20)) if low < 98 else 90.0
    across = (width - left - right) / max(len(places) - 1, 1)

    def x(place: int) -> float:
        return left + across * place if len(places) > 1 else (left + width - right) / 2

    def y(value: float) -> float:
        return top + (height - top - bottom) * (100 - value) / (100 - floor)

    parts = []
    step = 20 if floor <= 40 else 10 if floor <= 60 else 5
    for tick in np.arange(floor, 101, step):
        parts.append(f'<line class="g" x1="{left}" x2="{width - right}" {_y12(y(tick))}/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" class="e">{tick:.0f}</text>')
    longest = min(max((len(str(place)) for place in places), default=1), LONGEST_PLACE)
    every = max(1, -(-len(places) * (8 * longest + 4) // (width - left - right)))
    for i in range(0, len(places), every):
        name, _ = _short(places[i], LONGEST_PLACE)
        anchor = "e" if 0 < i == len(places) - 1 and len(name) > 3 else "m"
        parts.append(f'<text x="{x(i):.1f}" y="{height - 23}" class="{anchor}">{name}</text>')
    legend = []
    for number, (name, values) in enumerate(series.items()):
        color = f"c{number % MOST_CURVES}"
        points = [(x(i), y(v), places[i], v, i) for i, v in enumerate(values) if v is not None]
        dash = " dash" if name in dashed else ""
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b, *_, i in points if i not in hollow)
        parts.append(f'<polyline class="{color}{dash}" points="{line}"/>')
        sign = _MARKERS[number % len(_MARKERS)]
        # Of very many places, the line alone tells them.
        marked = [
            p for p in points if len(points) <= MOST_MARKED or p[-1] in hollow or p is points[-1]
        ]
        for a, b, place, value, i in marked:
            kind = f"{color} p{' open' if i in hollow else ''}"
            parts.append(
                f'<g class="{kind}"><title>{text(name)}, {text(place)}: {value:.1f}</title>'
                f"{_marker(number, a, b)}</g>"
            )
        last = f"{points[-1][3]:.1f}" if points else "–"
        key = f'<span class="{color}" aria-hidden="true">{sign}</span>'
        legend.append(f"<li>{key} {text(name)} <b>{last}</b></li>")
    parts.append(f'<text x="{left - 30}" y="{height - 5}">{text(y_label)}</text>')
    return Markup(
        f'<figure><figcaption>{text(title)}</figcaption>\n<svg viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{text(title)}, {text(y_label)}; the last values are below">\n'
        + "\n".join(parts)
        + f'\n</svg>\n<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def _y12(y: float) -> str:
    return f'y1="{y:.1f}" y2="{y:.1f}"'


def _marker(number: int, x: float, y: float) -> str:
    """Return the marker of a curve, so that curves differ without colour too."""
    kind = number % 4
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    if kind == 1:
        return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
    corners = ((0, -4), (3.8, 3), (-3.8, 3)) if kind == 2 else ((0, -4), (4, 0), (0, 4), (-4, 0))
    return f'<path d="M{"L".join(f"{x + a:.1f} {y + b:.1f}" for a, b in corners)}Z"/>'


def tree(title: str, names: Sequence[str], distances: np.ndarray) -> Markup:
    """Return a tree of the most alike, by average linkage of distances `[n, n]`, n at least 2.

    With more than `MOST_LEAVES` names, those that are most alike stand in one leaf.
    """
    upper = np.maximum(np.asarray(distances, float)[np.triu_indices(len(names), 1)], 0)
    linkage = scipy.cluster.hierarchy.linkage(upper, method="average")
    cut = {"truncate_mode": "lastp", "p": MOST_LEAVES} if len(names) > MOST_LEAVES else {}
    drawn = scipy.cluster.hierarchy.dendrogram(linkage, no_plot=True, labels=list(names), **cut)
    leaves = [_leaf(leaf, names, linkage) for leaf in drawn["leaves"]]
    width, left, right, top, row = 380, 18, 118, 14, 20
    height = top + row * len(leaves) + 34
    most = max(float(upper.max()), 1e-9)

    def x(distance: float) -> float:
        return width - right - (width - left - right) * distance / most

    def y(place: float) -> float:  # leaves stand at 5, 15, 25, ...
        return top + row * place / 10

    parts = []
    for tick in np.linspace(0, most, 4):
        at = x(tick)
        parts.append(
            f'<line class="g" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{height - 32}"/>'
            f'<text class="m" x="{at:.1f}" y="{height - 18}">{tick:.2g}</text>'
        )
    for places, depths in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        pairs = zip(depths, places, strict=True)
        line = " ".join(f"{x(depth):.1f},{y(place):.1f}" for depth, place in pairs)
        parts.append(f'<polyline class="t" points="{line}"/>')
    for number, leaf in enumerate(leaves):
        name, _ = _short(leaf, 15)
        at = y(10 * number + 5) + 4
        parts.append(
            f'<text x="{width - right + 7}" y="{at:.1f}">{name}<title>{text(leaf)}</title></text>'
        )
    parts.append(f'<text x="{left}" y="{height - 5}">distance</text>')
    return Markup(
        f'<figure><figcaption>{text(title)}</figcaption>\n<svg viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{text(title)}: a tree of {len(names)}">\n'
        + "\n".join(parts)
        + "\n</svg></figure>"
    )


def _leaf(leaf: int, names: Sequence[str], linkage: np.ndarray) -> str:
    if leaf < len(names):
        return names[leaf]
    inside = scipy.cluster.hierarchy.to_tree(linkage, rd=True)[1][leaf].pre_order()
    return f"{len(inside)}: {', '.join(names[i] for i in inside[:9])}"


def image_data(levels: np.ndarray) -> str:
    """Return an image, uint8 `[H, W, 3]`, as a URL that holds it, a PNG."""
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def over_image(
    title: str, levels: np.ndarray, values: np.ndarray | None, limits: tuple[float, float]
) -> Markup:
    """Return an image, uint8 `[size, size, 3]`, with values `[grid, grid]` in colours over it.

    Coarse grids have their numbers in the cells, in percent. `values` None: the image alone.
    """
    side = 280
    parts = [
        f'<image href="{image_data(levels)}" width="{side}" height="{side}" '
        'preserveAspectRatio="none" class="pixels"/>'
    ]
    if values is not None:
        low, high = limits
        grid, parted = len(values), low < 0
        cell = side / grid
        for (row, column), value in np.ndenumerate(values):
            share = (value - low) / (high - low) if high > low else 0.0
            shade = f"{'d' if parted else 'h'}{round(min(max(share, 0), 1) * (_SHADES - 1))}"
            x, y = cell * column, cell * row
            parts.append(
                f'<rect class="{shade} veil" x="{x:.1f}" y="{y:.1f}" width="{cell:.2f}" '
                f'height="{cell:.2f}"/>'
            )
            if grid <= 8:
                number = number_of(100 * value, "{:+.0f}" if parted else "{:.0f}")
                parts.append(
                    f'<text class="m over" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 5:.1f}">'
                    f"{number}</text>"
                )
    return Markup(
        f'<figure class="small"><figcaption>{text(title)}</figcaption>\n'
        f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{text(title)}">\n'
        + "\n".join(parts)
        + "\n</svg></figure>"
    )


def bars(
    caption: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]], values: Sequence[float]
) -> Markup:
    """Return a table whose second column is a bar for each of `values`, to the left below 0."""
    most = max(map(abs, values), default=0.0) or 1.0
    drawn = []
    for row, value in zip(rows, values, strict=True):
        share = 50 * abs(value) / most
        start = 50 - share if value < 0 else 50.0
        kind = "minus" if value < 0 else "plus"
        svg = (
            '<svg class="bars" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="{kind}" x="{start:.1f}" y="1" width="{share:.1f}" height="10"/>'
            '<line class="axis" x1="50" x2="50" y1="0" y2="12"/></svg>'
        )
        drawn.append([row[0], Markup(svg), *row[1:]])
    return table(caption, [columns[0], "", *columns[1:]], drawn, left=(0, 1))


# The page.


def page(title: str, lead: Markup, sections: Sequence[Section], footer: str) -> str:
    """Return a whole page: `lead` below its title, then the sections with links to each."""
    links = "".join(f'<li><a href="#{s.anchor}">{text(s.heading)}</a></li>' for s in sections)
    bodies = "\n".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-h">\n'
        f'<h2 id="{s.anchor}-h">{text(s.heading)}</h2>\n{s.body}\n</section>'
        for s in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is fetched, and no script runs, whatever stands in a class name.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">\n"
        f'{_GENERATOR}\n<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n'
        f"<style>{_style()}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">To the content</a>\n<header>\n<h1>{text(title)}</h1>\n'
        f'{lead}\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n'
        f'<main id="main">\n{bodies}\n</main>\n<footer><p>{text(footer)} soft_jax '
        f"{text(__version__)}.</p></footer>\n</body>\n</html>\n"
    )


def check_output(file: Path) -> None:
    """Raise UserError where a page can't be written to `file`, or would replace something else."""
    paths.check_writable(file, "--output", paths.FILE)
    try:
        if not os.access(file.parent, os.W_OK):
            raise UserError(
                f"--output: {paths.shown(file)} can't be written, as nothing can in that folder; "
                "name another file with --output=FILE"
            )
        replaceable = not os.path.lexists(file) or _is_ours(file)
    except OSError as error:
        raise UserError(
            f"--output: {paths.shown(file)} can't be read ({error.strerror}), so it is not "
            "replaced; name another file"
        ) from error
    if not replaceable:
        raise UserError(
            f"--output: {paths.shown(file)} is there and is no page that soft-jax made, so it is "
            "not replaced; name another file, or remove it"
        )


def _is_ours(file: Path) -> bool:
    """Whether a file is a page of ours, or empty. Raises OSError where it can't be read."""
    with open(file, "rb") as opened:
        start = opened.read(2000).decode("utf-8", "replace")
    return not start or bool(_OURS.search(start))


def write(file: Path, content: str) -> None:
    """Write a page, whole or not at all. Raises UserError where that can't be done."""
    check_output(file)
    try:
        write_text(file, content)
    except UserError as error:
        raise UserError(f"{error}; or name another file with --output=FILE") from error


@functools.cache
def _style() -> str:
    from matplotlib import colormaps  # here: it takes longer to import than a page to make

    shades = []
    for kind, name in (("h", "cividis"), ("d", "PuOr")):
        for i, rgba in enumerate(colormaps[name](np.linspace(0, 1, _SHADES))):
            red, green, blue = (round(255 * part) for part in rgba[:3])
            ink = "#000" if _luminance(rgba[:3]) > 0.18 else "#fff"  # the better contrast of both
            color = f"#{red:02x}{green:02x}{blue:02x}"
            shades.append(f".{kind}{i}{{background:{color};color:{ink};fill:{color}}}")
    bars_ = {}
    for name in ("cividis", "PuOr"):
        stops = colormaps[name](np.linspace(0, 1, 7))[:, :3]
        colors = ("#" + "".join(f"{round(255 * part):02x}" for part in stop) for stop in stops)
        bars_[name] = f"linear-gradient(90deg,{','.join(colors)})"
    scales = f".bar{{background:{bars_['cividis']}}}.bar.parted{{background:{bars_['PuOr']}}}"
    return _CSS + scales + "".join(shades)


def _luminance(color: Sequence[float]) -> float:
    """Return the relative luminance of an sRGB colour in [0, 1], as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


# Curves after Okabe and Ito (2008), lighter where the page is dark.
_CSS = """
:root{--paper:#fff;--ink:#1b1d20;--soft:#575c63;--line:#d5d8dc;--panel:#f5f6f8;--link:#00558c;
--mark:#fff4d6;--c0:#0072b2;--c1:#c24a00;--c2:#00805c;--c3:#b0508b;--c4:#9a6a00;--c5:#2b7fb0;
--c6:#1b1d20;--c7:#6b6f76}
@media(prefers-color-scheme:dark){:root{--paper:#14161a;--ink:#e9eaec;--soft:#a8adb5;
--line:#353a42;--panel:#1d2026;--link:#7cc4f2;--mark:#3a3216;--c0:#56b4e9;--c1:#f0884a;
--c2:#2cc79a;--c3:#e59cc8;--c4:#e6b340;--c5:#9bd0f5;--c6:#e9eaec;--c7:#a8adb5}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:72rem;padding:1.5rem 1rem 3rem;background:var(--paper);
color:var(--ink);font:1rem/1.55 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .5rem}
h2{font-size:1.25rem;margin:0 0 .75rem;padding-top:.9rem;border-top:1px solid var(--line)}
h3{font-size:1.02rem;margin:1.6rem 0 .4rem}
p{margin:.4rem 0 .9rem;max-width:46rem}
p.note,footer{color:var(--soft);font-size:.9rem}
section{margin-top:2.4rem}
a{color:var(--link)}
a:focus-visible,summary:focus-visible,.box:focus-visible{outline:2px solid var(--link);
outline-offset:2px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;background:var(--paper);padding:.3rem .6rem}
nav ul,.legend{list-style:none;margin:.9rem 0 0;padding:0;display:flex;flex-wrap:wrap;
gap:.3rem 1.1rem}
.facts{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0}
.facts div{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;
padding:.45rem .8rem;min-width:6.5rem}
.facts dt{color:var(--soft);font-size:.82rem}
.facts dd{margin:0;font-size:1.15rem;font-weight:600;font-variant-numeric:tabular-nums}
.box{overflow:auto;max-height:36rem;max-width:100%;margin:.2rem 0 1rem}
.box.heats{margin-bottom:.2rem;max-height:none}
table{border-collapse:collapse;font-size:.9rem;line-height:1.35;font-variant-numeric:tabular-nums;
overflow-wrap:normal;white-space:nowrap}
.caption{font-weight:600;font-size:.9rem;margin:.9rem 0 0}
th,td{padding:.32rem .65rem .32rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;font-size:.84rem;vertical-align:bottom}
tbody th{font-weight:600}
th.n,td.n{text-align:right}
td.w{white-space:normal;min-width:15rem;overflow-wrap:anywhere}
tr.mark th,tr.mark td{background:var(--mark)}
.heat{border-collapse:separate;border-spacing:2px}
.heat th,.heat td{border:0;padding:.25rem .3rem}
.heat td{text-align:center;min-width:2.5rem;border-radius:3px;white-space:nowrap;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.heat thead th{text-align:center}
.heat .corner{text-align:left;min-width:5rem;max-width:9rem;font-weight:400;white-space:normal}
.heat tbody th{font-weight:400;white-space:nowrap;padding-right:.6rem;position:sticky;left:0;
background:var(--paper)}
.heat th.up span{writing-mode:vertical-rl;transform:rotate(180deg);display:inline-block;
white-space:nowrap}
.scale{display:flex;align-items:center;gap:.5rem;color:var(--soft);font-size:.84rem;
margin:0 0 1rem}
.bar{display:inline-block;width:7rem;height:.7rem;border-radius:3px;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));
gap:.6rem 2rem;align-items:start}
.grid.four{grid-template-columns:repeat(auto-fill,minmax(min(13rem,45%),1fr));gap:.6rem 1rem;
align-items:end}
.cell{min-width:0}
figure{margin:.6rem 0;max-width:28rem}
figure.small{max-width:16rem}
figcaption{font-weight:600;font-size:.9rem;padding-bottom:.3rem}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--soft);font-family:inherit}
svg .m{text-anchor:middle}svg .e{text-anchor:end}svg .s{text-anchor:start}
svg .g{stroke:var(--line);stroke-width:1}
svg .t{fill:none;stroke:var(--c0);stroke-width:1.6}
svg polyline{fill:none;stroke-width:1.8;stroke:currentColor}
svg .p{fill:currentColor;stroke:currentColor;stroke-width:1.2}
svg .p.open{fill:var(--paper)}
svg .dash{stroke-dasharray:5 4}
svg .pixels{image-rendering:pixelated}
svg .veil{fill-opacity:.62}
svg .over{fill:#fff;font-weight:600;font-size:14px;paint-order:stroke;stroke:#000;
stroke-width:2.6px}
svg.bars{width:6.5rem;height:.85rem;margin-top:.2rem}
svg .plus{fill:var(--c1)}svg .minus{fill:var(--c0)}svg .axis{stroke:var(--soft);stroke-width:.8}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
.legend{font-size:.88rem;margin:.2rem 0 0;gap:.15rem 1rem}
.legend b{font-variant-numeric:tabular-nums}
details{margin:.6rem 0 .9rem}
summary{cursor:pointer;color:var(--link);font-size:.95rem}
details details{margin-left:.8rem}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.8rem}
@media print{body{max-width:none;padding:0}nav,.skip{display:none}.box{max-height:none;
overflow:visible}section{break-inside:auto}figure,tr,.heat{break-inside:avoid}}
"""
