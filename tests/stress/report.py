"""What the parts of the stress test found, as Markdown. Results are kept as JSON: parts may run one at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.stress.resources import Findings

INTRODUCTION = """What servers of `python -m app` went through, by `make stress`, on real sockets; `tests/stress/` says
how. Where a part injects faults it runs `tests/app/faulty_server.py`, which is the same server with a runner that
fails where a request's seed says so. Durations of steps, cancels and requests are upper bounds of a histogram's
buckets, or were measured by the client. In the mixed load a fault makes a step last 4 s, which cancels have to wait
for, and readiness is off meanwhile. Not here, because their tests in `tests/app/test_fatal_errors.py` are as long as
they can be: a disk that is full, a checkpoint that is cut short in its place while it is served, a step of 4 s, a
second SIGTERM."""


@dataclass(frozen=True)
class Part:
    """What one part found, and how it was made."""

    name: str
    what: str
    command: str
    circumstances: str
    seconds: float
    outcomes: list[tuple[str, str, int]]  # kind of client, outcome, number
    numbers: dict[str, float | str]
    wrong: list[str]


def part_of(name: str, what: str, command: str, circumstances: str, seconds: float, findings: Findings) -> Part:
    """Findings, to be kept."""
    outcomes = [(kind, outcome, count) for (kind, outcome), count in sorted(findings.outcomes.items()) if count]
    return Part(name, what, command, circumstances, round(seconds, 1), outcomes, findings.numbers, findings.wrong)


def read(path: Path) -> dict[str, Part]:
    """By name; none where there is no file."""
    if not path.exists():
        return {}
    return {name: Part(**fields) for name, fields in json.loads(path.read_text()).items()}


def write(path: Path, parts: dict[str, Part]) -> None:
    """The inverse of `read`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: asdict(part) for name, part in parts.items()}, indent=1))


def render(parts: list[Part]) -> str:
    """A table of all, and a section for each."""
    lines = ["# Stress test results", "", INTRODUCTION, ""]
    lines += sorted({part.circumstances for part in parts})
    lines += ["", "| part | command | s | outcome |", "|---|---|---:|---|"]
    for part in parts:
        outcome = f"**{len(part.wrong)} things are wrong**" if part.wrong else "nothing is wrong"
        cells = [f"[{part.name}](#{part.name}): {part.what}", f"`{part.command}`", f"{part.seconds:.0f}", outcome]
        lines.append(f"| {' | '.join(cells)} |")
    for part in parts:
        lines += ["", f"## {part.name}", "", f"{part.what[0].upper()}{part.what[1:]}.", ""]
        lines += [f"- wrong: {sentence}" for sentence in part.wrong[:50]] + [""] * bool(part.wrong)
        if part.outcomes:
            lines += ["| client | outcomes |", "|---|---|"]
            by_kind = defaultdict(list)
            for kind, outcome, count in part.outcomes:
                by_kind[kind].append(f"{count:,} {outcome}")
            lines += [f"| {kind} | {', '.join(found)} |" for kind, found in by_kind.items()] + [""]
        lines += ["| measured | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in part.numbers.items()]
    return "\n".join(lines) + "\n"
