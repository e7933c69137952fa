"""The report: one HTML file that needs nothing else, with its plots and pictures inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none is to be opened

import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fastattn.bench import tables, targets  # noqa: E402
from fastattn.bench.contenders import OURS, STOCK  # noqa: E402
from fastattn.bench.records import Record  # noqa: E402
from fastattn.bench.workloads import MASK_KINDS  # noqa: E402

COLOURS = {
    OURS: "#c2410c",
    "cuda": "#ea580c",
    "cuda-portable": "#d97706",
    "triton": "#be185d",
    "sdpa": "#1d4ed8",
    STOCK: "#1d4ed8",
    "stock": "#1d4ed8",
    "sdpa-math": "#0e7490",
    "sdpa-flash": "#0369a1",
    "sdpa-efficient": "#4f46e5",
    "sdpa-cudnn": "#65a30d",
    "eager": "#64748b",
    "compile": "#15803d",
    "flex": "#7e22ce",
}
MASK_LINES = {"dense": "-", "causal": "--", "window": ":"}
SUITE_TITLES = {
    "attention": "Attention",
    "weights": "Attention with its weights",
    "mha": "MultiheadAttention",
    "loss": "Masked losses",
    "additive": "Additive attention",
    "head": "Prediction head with masked loss",
    "transformers": "Hugging Face transformers",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { margin-top: 2.5rem; border-bottom: 1px solid #cbd5e1 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-size: 13px; width: 100% }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e2e8f0; vertical-align: top }
th { color: #475569; font-weight: 600 } tr.ours td { background: #fff7ed; font-weight: 600 }
tr.case td { padding-top: .9rem; font-weight: 600; border-bottom: 1px solid #94a3b8 }
.pass { color: #15803d; font-weight: 700 } .fail { color: #b91c1c; font-weight: 700 }
code, pre { background: #f1f5f9; padding: .1rem .3rem; border-radius: 3px; font-size: 13px }
pre { padding: .6rem; overflow-x: auto } img { max-width: 100%; height: auto } .note { color: #475569; font-size: 13px }
"""


def png(figure: Figure) -> bytes:
    """The figure as PNG; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def curves(records: Sequence[Record]) -> Figure | None:
    """Speed and memory over the sequence length; None when fewer than two lengths were run."""
    chosen = [r for r in records if r.get("curve") and r["suite"] == "attention" and "time" in r]
    if len({r["len_k"] for r in chosen}) < 2:
        return None
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4))
    for name in dict.fromkeys(r["contender"] for r in chosen):
        for style, mask in zip(("-", "--", ":", "-."), dict.fromkeys(r["mask"] for r in chosen), strict=False):
            mine = [r for r in chosen if r["contender"] == name and r["mask"] == mask]
            mine.sort(key=lambda r: r["len_k"])
            label, colour = f"{name}, {mask}", COLOURS.get(name, "#be185d")
            if mine:
                lengths = [r["len_k"] for r in mine]
                speed.plot(
                    lengths, [r["useful_flops"] / 1e9 for r in mine], style, marker="o", color=colour, label=label
                )
            measured = [(r["len_k"], r["memory"]["extra"] / 1e6) for r in mine if "memory" in r]
            if measured:
                memory.plot(*zip(*measured, strict=True), style, marker="o", color=colour, label=label)
    speed.set(title=f"Speed, {chosen[0]['step']}", ylabel="useful GFLOP/s", ylim=(0, None))
    # Linear below 1 MB: a kernel that stores nothing has no place on a logarithmic axis.
    memory.set(title="Peak memory beyond inputs and outputs", ylabel="MB")
    memory.set_yscale("symlog", linthresh=1.0)
    memory.set_ylim(0, None)
    lengths = sorted({r["len_k"] for r in chosen})
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xlabel("sequence length")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def mask_ratios(records: Sequence[Record]) -> Figure | None:
    """How many times faster than each peer we are, for each mask kind, over the problems of one shape."""
    chosen = [r for r in records if r["suite"] == "attention" and "ratio" in r and r["mask"] in MASK_KINDS]
    if not chosen:
        return None
    groups: dict[tuple[str, str, str], int] = {}
    for r in chosen:
        key = (r["shape"], r["dtype"], r["step"])
        groups[key] = groups.get(key, 0) + 1
    shape, dtype, step = max(groups, key=lambda key: groups[key])
    chosen = [r for r in chosen if (r["shape"], r["dtype"], r["step"]) == (shape, dtype, step)]
    masks = list(dict.fromkeys(r["mask"] for r in chosen))
    peers = list(dict.fromkeys(r["contender"] for r in chosen))
    figure, axes = plt.subplots(figsize=(11, 4))
    width = 0.8 / len(peers)
    for n, peer in enumerate(peers):
        mine = {r["mask"]: r["ratio"] for r in chosen if r["contender"] == peer}
        places = [x + (n - (len(peers) - 1) / 2) * width for x, mask in enumerate(masks) if mask in mine]
        ratios = [mine[mask] for mask in masks if mask in mine]
        spread = [[r["median"] - r["p20"] for r in ratios], [r["p80"] - r["median"] for r in ratios]]
        bars = axes.bar(
            places, [r["median"] for r in ratios], width, yerr=spread, color=COLOURS.get(peer, "#be185d"), label=peer
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(masks)), masks)
    axes.set(title=f"How many times faster fastattn is: ({shape}) {dtype} {step}", ylabel="× the speed of the peer")
    axes.legend(fontsize=8)
    return figure


def length_scaling(records: Sequence[Record]) -> Figure | None:
    """Time, and time an attending pair, over the sequence length; a row of plots for each step."""
    chosen = [r for r in records if r["scaling"] == "length" and "time" in r]
    steps = list(dict.fromkeys(r["step"] for r in chosen))
    if not steps:
        return None
    figure, rows = plt.subplots(len(steps), 2, figsize=(11, 4 * len(steps)), squeeze=False)
    for (times, pairs), step in zip(rows, steps, strict=True):
        for name, mask in product((OURS, "sdpa"), dict.fromkeys(r["mask"] for r in chosen)):
            mine = [r for r in chosen if (r["contender"], r["mask"], r["step"]) == (name, mask, step)]
            mine.sort(key=lambda r: r["len_k"])
            lengths, taken = [r["len_k"] for r in mine], [r["time"]["median_s"] for r in mine]
            look = {"color": COLOURS[name], "linestyle": MASK_LINES[mask], "marker": "o", "label": f"{name}, {mask}"}
            if mine:
                times.plot(lengths, [1e3 * t for t in taken], **look)
                each = [1e9 * t / r["attending_pairs"] for t, r in zip(taken, mine, strict=True)]
                pairs.plot(lengths, each, **look)
        times.set(title=f"Time, {step}", ylabel="ms")
        pairs.set(title=f"Time an attending pair, {step}: flat is in proportion", ylabel="ns")
        for axes in (times, pairs):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("sequence length")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def share_scaling(records: Sequence[Record]) -> Figure | None:
    """Time over the share of the keys that are no padding, and speed over the threads, each beside its ideal."""
    padded = [r for r in records if r["scaling"] == "live" and "time" in r]
    threaded = [r for r in records if r["scaling"] == "threads" and "time" in r]
    if not padded or not threaded:
        return None
    figure, (live, threads) = plt.subplots(1, 2, figsize=(11, 4))
    for name, step in product((OURS, "sdpa"), dict.fromkeys(r["step"] for r in padded)):
        mine = {r["live"]: r["time"]["median_s"] for r in padded if (r["contender"], r["step"]) == (name, step)}
        whole = mine.get(1.0)
        if whole:
            shares = sorted(mine)
            style = MASK_LINES["dense" if step == "forward" else "causal"]
            relative = [mine[share] / whole for share in shares]
            live.plot(shares, relative, marker="o", color=COLOURS[name], linestyle=style, label=f"{name}, {step}")
    live.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="in proportion")
    live.set(title=f"Padding, S = {padded[0]['len_k']}", xlabel="share of live keys", ylabel="time over that of all")
    for name, mask in product((OURS, "sdpa"), dict.fromkeys(r["mask"] for r in threaded)):
        chosen = [r for r in threaded if (r["contender"], r["mask"]) == (name, mask)]
        seconds = {r["case_threads"]: r["time"]["median_s"] for r in chosen}
        if seconds:
            counts = sorted(seconds)
            gained = [seconds[counts[0]] / seconds[count] * counts[0] for count in counts]
            look = {"color": COLOURS[name], "linestyle": MASK_LINES[mask], "label": f"{name}, {mask}"}
            threads.plot(counts, gained, marker="o", **look)
    most = max(r["case_threads"] for r in threaded)
    threads.plot([1, most], [1, most], color="black", linewidth=0.8, label="in proportion")
    threads.set(title=f"Threads, {threaded[0]['step']}", xlabel="threads", ylabel="times the speed of one thread")
    threads.set_xticks(sorted({r["case_threads"] for r in threaded}))
    for axes in (live, threads):
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def loss_curves(record: Record) -> Figure:
    """The two loss curves of the SimMIM run and their difference."""
    figure, (both, difference) = plt.subplots(1, 2, figsize=(11, 4))
    stock, ours = np.asarray(record["losses"]["stock"]), np.asarray(record["losses"][OURS])
    steps = np.arange(1, len(stock) + 1)
    both.plot(steps, stock, color=COLOURS["stock"], linewidth=3, alpha=0.5, label="stock")
    both.plot(steps, ours, color=COLOURS[OURS], linewidth=1, label=OURS)
    both.set(title="Loss on the hidden pixels", xlabel="step", ylabel="L1, normalised pixels")
    both.legend()
    relative = np.maximum(np.abs(stock - ours) / stock, 1e-9)  # equal losses have to be drawn somewhere
    difference.semilogy(steps, relative, color="#1e293b", linewidth=1)
    criterion, compared = record["agreement"]["criterion"], record["agreement"]["compared_steps"]
    difference.plot(
        [1, compared], [criterion, criterion], color="#b91c1c", label=f"criterion: {criterion:g} to {compared}"
    )
    difference.set(title="Relative difference of the two losses", xlabel="step")
    difference.legend()
    for axes in (both, difference):
        axes.grid(alpha=0.3)
    return figure


def picture_grid(pictures: dict[str, np.ndarray]) -> Figure:
    """Original, masked and reconstructed, one row each."""
    count = len(next(iter(pictures.values())))
    figure, axes = plt.subplots(len(pictures), count, figsize=(2.4 * count, 2.4 * len(pictures)), squeeze=False)
    for row, (name, images) in zip(axes, pictures.items(), strict=True):
        for cell, image in zip(row, images, strict=True):
            cell.imshow(image)
            cell.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    figure.tight_layout()
    return figure


def _embedded(figure: Figure, alt: str) -> str:
    return _image(png(figure), alt)


def _image(data: bytes, alt: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{encoded}"></p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _verdict(passed: bool) -> str:
    return f'<span class="{"pass" if passed else "fail"}">{tables.verdict(passed)}</span>'


def _results_table(records: Sequence[Record]) -> str:
    columns = tables.columns(records)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("contender", *columns))
    body = ""
    title = None
    for record in records:
        if record["title"] != title:
            title = record["title"]
            body += f'<tr class="case"><td colspan="{len(columns) + 1}">{html.escape(title)}</td></tr>'
        remark = tables.remark(record)
        if remark:
            cells = f'<td colspan="{len(columns)}" class="{_remark_class(record)}">{html.escape(remark)}</td>'
        else:
            cells = "".join(f"<td>{html.escape(tables.cell(record, column))}</td>" for column in columns)
        ours = ' class="ours"' if record["contender"] == OURS else ""
        body += f"<tr{ours}><td>{html.escape(record['contender'])}</td>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _remark_class(record: Record) -> str:
    return "note" if record["status"] == "unavailable" else "fail"


def _conditions(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        measured = "not measured" if r["measured"] is None else f"{r['measured']:.2f} ×"
        rows.append([html.escape(r["title"]), html.escape(r["promise"]), measured, _verdict(r["pass"])])
    return "<h2>Promised speeds</h2>" + _table(("case", "promise", "measured", ""), rows)


def _targets(judged: Sequence[Record]) -> str:
    lines = []
    for cells, met in targets.rows(judged):
        shown = [html.escape(cell) for cell in cells[:-1]]
        lines.append([*shown, f'<span class="{"pass" if met else "fail"}">{cells[-1]}</span>'])
    return "<h2>Targets</h2>" + _table(targets.HEADER, lines)


def _simmim(record: Record, picture: bytes | None) -> str:
    agreement, settings = record["agreement"], record["settings"]
    text = (
        "<h2>SimMIM on photographs</h2>"
        f"<p>A ViT of {settings['depth']} blocks of width {settings['embed_dim']}, patches of {settings['patch']} "
        f"pixels, crops of {settings['size']} pixels, {settings['batch_size']} a step, {settings['steps']} steps; "
        "trained twice from the same seed: with <code>nn.MultiheadAttention</code> and the loss as SimMIM's authors "
        "write it (stock), and with <code>fastattn.replace_multihead_attention(model)</code> and "
        "<code>masked_l1_loss</code>.</p>"
    )
    rows = [[html.escape(cell) for cell in tables.simmim_row(record, variant)] for variant in ("stock", OURS)]
    text += _table(tables.SIMMIM_COLUMNS, rows)
    text += f"<p>{html.escape(tables.simmim_findings(record))}: {_verdict(agreement['pass'])}</p>"
    text += _embedded(loss_curves(record), "loss curves")
    if picture is not None:
        text += "<p>Original, masked, and with the hidden part filled in by the model:</p>"
        text += _image(picture, "original, masked, reconstructed")
    return text


def render(environment: Record, records: Sequence[Record], picture: bytes | None = None) -> str:
    """The HTML of a run. picture: the PNG of the reconstructions."""
    results = [r for r in records if r["record"] == "result"]
    promised = [r for r in records if r["record"] == "condition"]
    gpu = environment["gpu"]
    machine = f"{environment['cpu']}, {environment['threads']} threads" + (f", {gpu}" if gpu else "")
    level = f" (kernels at {environment['cpu_level']})" if environment["cpu_level"] else ""
    parts = [
        "<h1>fastattn benchmark</h1>",
        f"<pre>{html.escape(environment['command'])}</pre>",
        f"<p>{html.escape(machine + level)}<br>fastattn {html.escape(str(environment['version']))}, torch "
        f"{html.escape(environment['torch'])}, Python {environment['python']}, {html.escape(environment['system'])}, "
        f"{html.escape(environment['date'])}</p>",
    ]
    if promised:
        parts.append(_conditions(promised))
    judged = [r for r in records if r["record"] == "target"]
    if judged:
        parts.append(_targets(judged))
    for suite, title in SUITE_TITLES.items():
        mine = [r for r in results if r["suite"] == suite and not r.get("scaling")]
        if not mine:
            continue
        parts.append(f"<h2>{title}</h2>")
        if suite == "attention":
            for figure, alt in ((curves(mine), "speed and memory"), (mask_ratios(mine), "ratio for each mask kind")):
                parts.append("" if figure is None else _embedded(figure, alt))
        parts.append(_results_table(mine))
    scaling = [r for r in results if r.get("scaling")]
    if scaling:
        parts.append("<h2>Scaling</h2>")
        for figure, alt in ((length_scaling(scaling), "time over length"), (share_scaling(scaling), "time over work")):
            parts.append("" if figure is None else _embedded(figure, alt))
        parts.append(_results_table(scaling))
    if results:
        parts.append(f'<p class="note">{html.escape(tables.LEGEND)}</p>')
    parts += [_simmim(r, picture) for r in records if r["record"] == "simmim"]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>fastattn benchmark</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def write(directory: Path, environment: Record, records: Sequence[Record], picture: bytes | None = None) -> Path:
    """Writes report.html, and the picture as a file of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    if picture is not None:
        (directory / "simmim.png").write_bytes(picture)
    path = directory / "report.html"
    path.write_text(render(environment, records, picture), encoding="utf-8")
    return path
