"""Fill the generated parts of README.md: the gate's table from the gate, the numbers from docs/bench.json.

``python scripts/readme.py`` writes, ``--check`` only compares (exit code 1 when README.md is out of date).
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from vllm_hidrop.engine.gate import RULES

ROOT = Path(__file__).parents[1]


def gate_table() -> str:
    """One row per rule."""
    return "\n".join(["| refused | because |", "|---|---|", *(f"| {rule.setting} | {rule.reason} |" for rule in RULES)])


def numbers_table(bench: dict[str, Any]) -> str:
    """One row per measurement, with command, versions and machine."""
    about = bench["rows"][0]["versions"]
    lines = [
        "| medians of paired runs | mode | stock | ours | speed-up | of the FLOP-ideal | KV bytes |",
        "|" + "---|" * 7,
    ]
    for row in bench["rows"]:
        mode = "both eager" if row["settings"]["eager"] else "both compiled"
        ideal = f"{row['share_of_ideal']:.0%} of {row['ideal_speedup']:.2f}x" if "ideal_speedup" in row else ""
        held = ""
        if "kv_blocks" in row:
            held = f"{row['kv_share_of_stock']:.0%} ({row['kv_blocks']} blocks, plan {row['kv_blocks_planned']})"
        cells = (
            row["name"],
            mode,
            f"{1000 * row['stock_seconds']:.1f} ms",
            f"{1000 * row['staged_seconds']:.1f} ms",
            f"**{row['speedup']:.2f}x**",
            ideal,
            held,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"\n`make bench`: {bench['model']}; {bench['cpu']}, {about['cpus']} cores, no GPU; vLLM {about['vllm']}, "
        f"torch {about['torch']}, Python {about['python']}; {bench['date']}."
    )
    return "\n".join(lines)


def fill(text: str, part: str, content: str) -> str:
    """Put ``content`` between the markers of ``part``."""
    pattern = re.compile(rf"(<!-- {part}:begin[^>]*-->\n).*?(<!-- {part}:end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)


def main() -> int:
    """Write or check."""
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = fill(old, "gate", gate_table())
    new = fill(new, "numbers", numbers_table(json.loads((ROOT / "docs" / "bench.json").read_text())))
    if "--check" in sys.argv:
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
