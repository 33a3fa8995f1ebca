"""Besieges a server for some minutes, and says what became of it. Exit code 1 if anything is wrong.

make soak                 ten minutes
make soak MINUTES=60
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch

from tests.app.conftest import CLASSES, GREY, write_checkpoint
from tests.bench.timing import circumstances
from tests.soak.run import Findings, break_down, lay_siege


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="besieges a server for some minutes")
    parser.add_argument("--minutes", type=float, default=10, help="of mixed load with recoverable faults (default: 10)")
    parser.add_argument("--overload-s", type=float, default=60, help="seconds of ten times too much work (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the clients' choices")
    parser.add_argument("--report", type=Path, default=Path("build/soak"), help="path without suffix: .md and .json")
    args = parser.parse_args(argv)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every byte written to a server that hung up
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "grey.safetensors", GREY, CLASSES)
        findings = lay_siege(checkpoint, 60 * args.minutes, args.overload_s, args.seed)
        fatal = break_down(checkpoint)
    findings.outcomes += fatal.outcomes
    findings.numbers |= fatal.numbers
    findings.wrong += fatal.wrong
    text = render(findings, f"{args.minutes:g} minutes, seed {args.seed}; {circumstances(torch.device('cpu'))}")
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.with_suffix(".md").write_text(text)
    outcomes = {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(findings.outcomes.items())}
    report = {"outcomes": outcomes, "numbers": findings.numbers, "wrong": findings.wrong}
    args.report.with_suffix(".json").write_text(json.dumps(report, indent=1))
    print(text)
    return 1 if findings.wrong else 0


def render(findings: Findings, circumstances: str) -> str:
    """The report as Markdown."""
    verdict = f"**{len(findings.wrong)} things are wrong.**" if findings.wrong else "Nothing is wrong."
    lines = ["# Soak", "", circumstances, "", verdict, ""]
    lines += [f"- {sentence}" for sentence in findings.wrong[:50]]
    lines += ["", "| client | outcome | number |", "|---|---|---|"]
    lines += [f"| {kind} | {outcome} | {count} |" for (kind, outcome), count in sorted(findings.outcomes.items())]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in findings.numbers.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
