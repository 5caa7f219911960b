"""Serve the checkpoints, ask them, and write docs/accuracy.md, docs/accuracy.png and docs/accuracy.json.

``python scripts/accuracy.py --ablations DIR --limit N --seed S --out ANSWERS`` goes on where an interrupted run ended.
"""

import argparse
import sys
from pathlib import Path

from vllm_hidrop.lab.evaluate.report.generate import load_exam, measure_selection, run, write

DOCS = Path(__file__).parents[1] / "docs"


def main() -> int:
    """Parse the options and do what they ask; returns 2 for what cannot be done."""
    parser = argparse.ArgumentParser(description="Accuracy of the embedded checkpoints, served.")
    parser.add_argument("--ablations", type=Path, help="directory of ablation checkpoints (default: none)")
    parser.add_argument("--limit", type=int, default=700, help="questions per row (default 700)")
    parser.add_argument("--seed", type=int, default=0, help="which scenes, and the resamples")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at once (default 4)")
    parser.add_argument("--out", type=Path, help="directory of the answers; a second run asks what is missing")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="groups or rows, as in ablation/flat")
    parser.add_argument("--no-agreement", action="store_true", help="do not ask the training code")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where to write (default: docs/)")
    parser.add_argument("--write", action="store_true", help="only text and figure, from the JSON file")
    parser.add_argument("--selection", action="store_true", help="only what bfloat16 does to the kept patches")
    options = parser.parse_args()
    if not options.write and not options.selection and options.out is None:
        parser.error("--out is needed to keep the answers")
    try:
        exam = load_exam(options.limit, options.seed, options.concurrency)
        if options.selection:
            measure_selection(exam, options.docs)
        elif not options.write:
            run(exam, options.out, options.ablations, options.only, not options.no_agreement, options.docs)
        write(options.docs)
    except ValueError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
