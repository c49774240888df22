"""A page to look at: what an example writes as its result."""

import base64
import csv
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mnops.train import checkpoint
from mnops.train.data import decode

STYLE = """body{font:15px sans-serif;margin:2em;max-width:70em}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}
figure{display:inline-block;margin:.4em;vertical-align:top;max-width:20em}
figure img{max-width:20em;min-width:6em}figcaption{font-size:13px;max-width:20em}svg{display:block;max-width:100%}"""
COLOURS = "#0a7", "#222", "#b52"  # of a chart's lines


class Page:
    """An index.html in one file: paragraphs, tables, pictures, charts and drawings."""

    def __init__(self, title: str) -> None:
        self.parts = [
            '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
            f"<h1>{html.escape(title)}</h1>",
        ]

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
        lines = [f"<tr>{''.join(f'<th>{html.escape(str(c))}</th>' for c in columns)}</tr>"]
        lines += [f"<tr>{''.join(f'<td>{html.escape(_shown(v))}</td>' for v in row)}</tr>" for row in rows]
        self.parts.append(f"<table>{''.join(lines)}</table>")

    def picture(self, caption: str, *images: Image.Image | np.ndarray | Path, side: int = 256) -> None:
        """Images side by side over a caption, made smaller where a side is longer than `side` pixels."""
        shown = "".join(f'<img alt="" src="data:image/jpeg;base64,{_jpeg(i, side)}">' for i in images)
        self.parts.append(f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def drawing(self, width: float, height: float, shapes: Iterable[str]) -> None:
        """An SVG of elements, whose text the caller has escaped."""
        self.parts.append(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'font-family="sans-serif" font-size="12">{"".join(shapes)}</svg>'
        )

    def chart(self, lines: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> None:
        """Named lines through (x, y) points of 0 or more, over axes that start at 0."""
        points = [point for line in lines.values() for point in line]
        width, height, left, below = 360, 240, 60, 40
        (right, x_ticks), (top, y_ticks) = (_axis(max(p[i] for p in points)) for i in range(2))

        def at(x: float, y: float) -> tuple[float, float]:
            return left + width * x / right, 20 + height * (1 - y / top)

        x0, y0 = at(0, 0)
        shapes = [f'<rect x="{x0}" y="20" width="{width}" height="{height}" fill="#f4f4f4"/>']
        for tick in x_ticks:
            x = at(tick, 0)[0]
            shapes.append(f'<path d="M{x:.1f} 20V{y0}" stroke="#ddd"/>'
                          f'<text x="{x:.1f}" y="{y0 + 16}" text-anchor="middle">{tick:g}</text>')  # fmt: skip
        for tick in y_ticks:
            y = at(0, tick)[1]
            shapes.append(f'<path d="M{x0} {y:.1f}h{width}" stroke="#ddd"/>'
                          f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')  # fmt: skip
        for i, ((name, line), colour) in enumerate(zip(lines.items(), COLOURS)):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
            shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
                          f'<text x="{x0 + width + 10}" y="{36 + 18 * i}" fill="{colour}">'
                          f"{html.escape(name)}</text>")  # fmt: skip
        shapes.append(f'<text x="{x0 + width / 2}" y="{y0 + 34}" text-anchor="middle">{html.escape(across)}'
                      f'</text><text x="{x0}" y="12">{html.escape(up)}</text>')  # fmt: skip
        self.drawing(left + width + 100, 20 + height + below, shapes)

    def losses(self, out: Path, *names: str, most: int = 200) -> None:
        """The losses over the steps that `fit` logged under these names in OUT; nothing where it did not run.

        Long runs are shown as means of neighbouring steps, `most` of them.
        """
        lines = {}
        for name in names:
            if (path := out / f"{name}.csv").is_file():
                with open(path, newline="") as file:
                    loss = np.array([float(row["loss"]) for row in csv.DictReader(file)])
                parts = np.array_split(np.arange(len(loss)), min(len(loss), most))
                lines[name] = [(float(part[-1] + 1), float(loss[part].mean())) for part in parts]
        if lines:
            self.chart(lines, "step", "loss in training")

    def write(self, path: Path, said: str = "") -> None:
        """Writes it; prints what is `said`, and where it is."""
        checkpoint.make_folder(path.parent)
        checkpoint.write_atomically(path, lambda file: file.write("\n".join(self.parts).encode()))
        if said:
            print(f"{said}; {path}", flush=True)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "\N{EN DASH}" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _jpeg(image: Image.Image | np.ndarray | Path, side: int) -> str:
    if isinstance(image, Path):
        image = decode(image)
    elif isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image = image.convert("RGB")
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    return base64.b64encode(data.getvalue()).decode()


def _axis(most: float) -> tuple[float, list[float]]:
    """The end of an axis from 0 that holds `most`, and its round ticks, three to six."""
    most = most if most > 0 and math.isfinite(most) else 1.0
    unit = 10.0 ** math.floor(math.log10(most))
    step = next(unit * part for part in (0.2, 0.5, 1, 2) if most / unit / part <= 5.0001)
    return max(most, 1e-12), [step * k for k in range(int(most / step + 1e-9) + 1)]
