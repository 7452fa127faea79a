"""Draw the roofline and the speed-ups of a result of `bench_kernels.py`, and make the tables.

    python benchmarks/plot_kernels.py benchmarks/results/kernels-X.json [--out DIR] \\
        [--readme README.md] [--docs docs/kernels.md]

A table replaces what stands between `<!-- bench:begin -->` and `<!-- bench:end -->`: some points in
README, all of them in docs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PEERS = ("B", "C", "D", "E")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Point = dict[str, Any]


def ours_of(point: Point) -> str:
    """The provider that stands for us: the kernels, or on a CPU the torch backend."""
    return "ours" if "ours" in point["providers"] else "ours_torch"


def median(point: Point, name: str, kind: str = "device_us") -> float:
    value: float = point["providers"][name][kind]["p50"]
    return value


def best_peer(point: Point) -> str:
    return min(
        (name for name in PEERS if name in point["providers"]), key=lambda n: median(point, n)
    )


def draw_roofline(report: dict[str, Any], path: Path) -> None:
    roofs = report["roofs"]
    fig, ax = plt.subplots(figsize=(7, 4.5))
    intensities = [p["flops"] / p["bytes"] for p in report["points"] if p["flops"]]
    low, high = min(intensities) / 2, max(intensities) * 2
    ridge = roofs["gemm_flops"] / roofs["copy_bytes_per_s"]
    xs = sorted({low, ridge, high} | set(intensities))
    ax.plot(
        xs,
        [min(roofs["copy_bytes_per_s"] * x, roofs["gemm_flops"]) / 1e12 for x in xs],
        color="black",
        linewidth=1,
        label="measured roofs",
    )
    for name, marker in (("D", "x"), ("B", "+"), ("ours", "o"), ("ours_torch", "o")):
        mine = [p for p in report["points"] if name in p["providers"] and p["flops"]]
        if mine:
            ax.scatter(
                [p["flops"] / p["bytes"] for p in mine],
                [p["flops"] / median(p, name) / 1e6 for p in mine],
                marker=marker,
                s=22,
                label=name,
            )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs per byte that must be moved",
        ylabel="TFLOP/s",
        title=f"{report['gpu'] if report['gpu'] != 'none' else report['cpu']}, {report['dtype']}",
    )
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def draw_speedups(report: dict[str, Any], path: Path) -> None:
    fig, ax = plt.subplots(figsize=(7, 5))
    colors, styles = {}, {1: ":", 2: "--", 4: "-"}
    series: dict[tuple[int, int], list[Point]] = {}
    for point in report["points"]:
        series.setdefault((point["size"], point["modalities"]), []).append(point)
    for (size, modalities), points in sorted(series.items()):
        points = sorted(points, key=lambda p: p["rows"])
        ax.plot(
            [p["rows"] for p in points],
            [median(p, best_peer(p)) / median(p, ours_of(p)) for p in points],
            marker=".",
            color=colors.setdefault(size, f"C{len(colors)}"),
            linestyle=styles.get(modalities, "-."),
            label=f"D = H = {size}, {modalities} {'modality' if modalities == 1 else 'modalities'}",
        )
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set(
        xscale="log",
        xlabel="rows in the step",
        ylabel="best peer's device time over ours",
    )
    ax.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


README_SIZES, README_ROWS = (1024, 4096), (1, 64, 1024, 8192)


def some_of(report: dict[str, Any]) -> dict[str, Any]:
    """The points that README shows."""
    points = [
        p
        for p in report["points"]
        if p["size"] in README_SIZES
        and (p["rows"] in README_ROWS or (p["modalities"] == 4 and p["rows"] == 8))
        and p["modalities"] in (1, 4)
    ]
    return {**report, "points": points}


def table(report: dict[str, Any]) -> str:
    """The table, in Markdown."""
    where = report["gpu"] if report["gpu"] != "none" else f"no GPU, {report['cpu']}"
    lines = [
        f"{where}, torch {report['torch']}, triton {report['triton']}, {report['dtype']}, commit "
        f"`{report['commit'][:12]}`, {report['date'][:10]}. Device us, medians; host us in "
        "brackets.",
        "",
        "| D = H | modalities | rows | floor | vLLM's way (B) | best peer | ours "
        "| ours / best peer | ours / floor | host, ours / B |",
        "|-|-|-|-|-|-|-|-|-|-|",
    ]
    for p in report["points"]:
        ours, peer = ours_of(p), best_peer(p)
        b = (
            f"{median(p, 'B'):.0f} ({median(p, 'B', 'host_us'):.0f})"
            if "B" in p["providers"]
            else ""
        )
        lines.append(
            f"| {p['size']} | {p['modalities']} | {p['rows']} | {p['floor_us']:.1f} | {b} | "
            f"{median(p, peer):.0f} ({peer}) | {median(p, ours):.1f} "
            f"({median(p, ours, 'host_us'):.0f}) | {median(p, ours) / median(p, peer):.2f} | "
            f"{median(p, ours) / p['floor_us']:.2f} | "
            f"{median(p, ours, 'host_us') / median(p, 'B', 'host_us'):.2f} |"
        )
    return "\n".join(lines)


def put_into(readme: Path, text: str) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: the marks are not there.
    """
    whole = readme.read_text()
    if BEGIN not in whole or END not in whole:
        raise ValueError(f"{readme} has no {BEGIN} ... {END}")
    before, rest = whole.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the PNGs; the result's own by default")
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    report = json.loads(args.result.read_text())
    out = args.out or args.result.parent
    out.mkdir(parents=True, exist_ok=True)
    for draw, name in ((draw_roofline, "roofline"), (draw_speedups, "speedup")):
        path = out / f"{args.result.stem}-{name}.png"
        draw(report, path)
        print(path)
    text = table(report)
    print(text)
    if args.readme:
        put_into(args.readme, table(some_of(report)))
    if args.docs:
        put_into(args.docs, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
