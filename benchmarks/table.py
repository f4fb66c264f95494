"""Tables of what `attention.py` measured, on the terminal; and in the pages that show what was measured.

    python benchmarks/table.py benchmarks/results/attention_cpu.json   prints all of it
    python benchmarks/table.py --readme                                brings the pages' tables up to date

In a page a table stands between two comments, of which the first names its file and, of `attention.py`, which points
it shows: `<!-- table of FILE [head_dim=128 ...] -->` and `<!-- end of table -->`. Of `extension.py` it is the summary,
of all arms or of some: `[arms=base,yarn rate=5e-4]`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from environment import ROOT
from extending.show import summary
from providers import PROVIDERS

PAGES = [ROOT / name for name in ("README.md", "benchmarks/README.md", "docs/extend.md")]
MARKED = re.compile(r"(<!-- table of (\S+)((?: \w+=\S+)*) -->\n).*?(<!-- end of table -->)", re.DOTALL)
SHAPE = ("dtype", "head_dim", "heads", "kv_heads")


def source(run: dict[str, Any]) -> str:
    """One sentence on where the figures come from."""
    env = run["environment"]
    instructions = f" ({', '.join(env['instructions'])})" if "instructions" in env else ""
    machine = [env["device"] + instructions]
    machine += [f"{env['threads']} threads"] if "threads" in env else [f"driver {env['driver']}"]
    said = f"{', '.join(machine)}, torch {env['torch']}, {env['date'].split()[0]}, commit {env['commit']}"
    return f"{said}. {env['note']}" if env["note"] else f"{said}."


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def times(points: list[dict[str, Any]], names: list[str], unit: str) -> list[str]:
    """Ours in milliseconds, the others as multiples of ours where it ran; in brackets the rate over attended pairs."""
    scale = {"TFLOP/s": 1, "GFLOP/s": 1000}[unit]
    lines = [row(["tokens", "", *(PROVIDERS[name].label for name in names)]), "|---" * (len(names) + 2) + "|"]
    for point in points:
        for direction in ("forward", "backward"):
            cells = [f"{point['seqlen']:,}", direction]
            for name in names:
                result = point["results"][name]
                if "reason" in result:
                    cells.append("-")
                    continue
                ms, rate = result[direction]["ms"], f"{result[direction]['tflops'] * scale:.0f}"
                ours = point["results"]["ours"].get(direction)
                absolute = name == "ours" or ours is None
                shown = f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
                cells.append(f"{shown} ms ({rate})" if absolute else f"{ms / ours['ms']:.2f}x ({rate})")
            lines.append(row(cells))
    return lines


def memory(points: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Peak of forward and backward beside the inputs, in MiB."""
    lines = [row(["tokens", *(PROVIDERS[name].label for name in names)]), "|---" * (len(names) + 1) + "|"]
    for point in points:
        peaks = (point["results"][name].get("peak_bytes") for name in names)
        batch = f" x {point['batch']}" if point["batch"] > 1 else ""
        lines.append(row([f"{point['seqlen']:,}{batch}", *("-" if p is None else f"{p / 2**20:,.0f}" for p in peaks)]))
    return lines


def reasons(points: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Why a cell is empty."""
    found: dict[str, list[str]] = {}
    for point in points:
        for name in names:
            if reason := point["results"][name].get("reason"):
                lengths = found.setdefault(f"{PROVIDERS[name].label}: {reason}", [])
                lengths.append(f"{point['seqlen']:,}")
    return [f"- {text} ({', '.join(lengths)} tokens)" for text, lengths in found.items()]


def tables(run: dict[str, Any], **only: str) -> str:
    """Markdown: for each dtype, head dim and number of KV heads its times, memory and what did not run."""
    points = [p for p in run["points"] if all(str(p[key]) in value.split(",") for key, value in only.items())]
    names = list(points[0]["results"]) if points else []
    unit = "GFLOP/s" if points and points[0]["device"] == "cpu" else "TFLOP/s"
    rate = 1000 if unit == "GFLOP/s" else 1
    parts = []
    for shape in dict.fromkeys(tuple(point[key] for key in SHAPE) for point in points):
        dtype, head_dim, heads, kv_heads = shape
        chosen = [point for point in points if tuple(point[key] for key in SHAPE) == shape]
        head = f"{dtype}, head dim {head_dim}, {heads} heads on {kv_heads} KV heads; rates in {unit}, "
        head += f"torch.mm's is {run['matmul_tflops'][dtype] * rate:.0f}:"
        parts.append("\n".join([head, "", *times(chosen, names, unit)]))
        if any("peak_bytes" in result for point in chosen for result in point["results"].values()):
            parts.append("\n".join(["peak memory beside the inputs, MiB:", "", *memory(chosen, names)]))
        if why := reasons(chosen, names):
            parts.append("\n".join(why))
    parts.append(source(run))
    return "\n\n".join(parts)


def with_tables(text: str) -> str:
    """`text` with each marked table made anew."""

    def fill(match: re.Match[str]) -> str:
        run = json.loads((ROOT / match[2]).read_text())
        only = dict(pair.split("=") for pair in match[3].split())
        made = summary(run, **only) if "arms" in run else tables(run, **only) + "\n"
        return f"{match[1]}{made}{match[4]}"

    return MARKED.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", type=Path, help="a JSON file of attention.py")
    what.add_argument("--readme", action="store_true", help="write the tables of the pages anew")
    options = parser.parse_args()
    if options.readme:
        for page in PAGES:
            page.write_text(with_tables(page.read_text()))
    else:
        print(tables(json.loads(options.file.read_text())))


if __name__ == "__main__":
    main()
