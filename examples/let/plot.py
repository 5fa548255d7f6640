"""Draw the curves of the experiment as an SVG, with nothing but the standard library.

python examples/let/plot.py runs/let --out plot.svg
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 28, 48  # margins; the legend stands in the right one
COLOURS = ("#555555", "#0b6fb8", "#c4461f", "#2d8a4e")

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 8)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def svg(
    lines: Mapping[str, Points], *, title: str, x: str, y: str, marks: Mapping[str, float], level: tuple[str, float]
) -> str:
    """A plot as text.

    Args:
        lines: points by name, in the order of the legend.
        title: above the plot.
        x: name of that axis.
        y: name of that axis.
        marks: places on the x axis, by what happened there.
        level: a value on the y axis to compare with, and its name.
    """
    xs = [point[0] for points in lines.values() for point in points]
    ys = [point[1] for points in lines.values() for point in points] + [level[1]]
    low, high = min(ys) - 0.05 * (max(ys) - min(ys)), max(ys) + 0.05 * (max(ys) - min(ys))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(value: float) -> float:
        return LEFT + width * value / max(xs)

    def down(value: float) -> float:
        return TOP + height * (high - value) / (high - low)

    def text(at_x: float, at_y: float, words: str, anchor: str = "start", colour: str = "#222222") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'

    def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 18, title),
        text(LEFT + width / 2, HEIGHT - 10, x, "middle"),
        f'<g transform="translate(16 {TOP + height / 2}) rotate(-90)">{text(0, 0, y, "middle")}</g>',
    ]
    for value in ticks(low, high):
        out += [line(LEFT, down(value), LEFT + width, down(value), 'stroke="#e4e4e4"'),
                text(LEFT - 6, down(value) + 4, f"{value:g}", "end")]  # fmt: skip
    for value in ticks(0, max(xs)):
        out.append(text(across(value), TOP + height + 16, f"{value:g}", "middle"))
    for row, (name, value) in enumerate(marks.items()):
        out += [line(across(value), TOP, across(value), TOP + height, 'stroke="#999999" stroke-dasharray="3 3"'),
                text(across(value) + 4, TOP + 12 + 14 * row, name, colour="#777777")]  # fmt: skip
    out += [line(LEFT, down(level[1]), LEFT + width, down(level[1]), 'stroke="#888888" stroke-dasharray="6 3"'),
            text(LEFT + width + 8, down(level[1]) + 4, level[0], colour="#888888")]  # fmt: skip
    for points, colour in zip(lines.values(), COLOURS, strict=False):
        path = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for row, (name, colour) in enumerate(zip(lines, COLOURS, strict=False)):
        at = TOP + 10 + 18 * row
        out += [line(LEFT + width + 8, at, LEFT + width + 28, at, f'stroke="{colour}" stroke-width="2"'),
                text(LEFT + width + 34, at + 4, name)]  # fmt: skip
    return "\n".join([*out, "</svg>", ""])


def curve(role: str, out: Path) -> dict[int, dict[str, float]]:
    """Evaluations of a training by step."""
    lines = (out / role / "curve.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def recoveries(role: str, out: Path) -> list[dict[str, float | str]]:
    """What `holdfast run` wrote down about failures."""
    lines = [line for path in (out / role / "run").glob("events*.jsonl") for line in path.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["kind"] == "recovery"]


def plot(out: Path) -> str:
    """The experiment whose curves lie in a folder."""
    plain, guided, teacher = (curve(role, out) for role in ("plain", "guided", "teacher"))
    marks = {"guidance ends": guided[max(guided)]["stop_step"]}
    for event in recoveries("guided", out)[:1]:
        marks["killed, resumed"] = float(event["step"])
    return svg(
        {role: [(step, row["held_out"]) for step, row in sorted(found.items())]
         for role, found in (("plain", plain), ("guided", guided))},
        title="Late-to-early guidance: held-out loss of the larger model, one seed",
        x="step", y="nats per byte", marks=marks, level=("teacher", teacher[max(teacher)]["held_out"]),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the --out of experiment.py")
    parser.add_argument("--out", type=Path, default=Path("plot.svg"))
    args = parser.parse_args()
    args.out.write_text(plot(args.runs))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
