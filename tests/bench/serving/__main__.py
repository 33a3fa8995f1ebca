"""Our server and what people would use instead, under the same arrivals: measures, tables, plots.

    python -m tests.bench.serving --sweep                     # first: batch size × wait of each peer, ten minutes
    python -m tests.bench.serving                             # an hour and a half; the machine must be quiet
    python -m tests.bench.serving --quick                     # does each server give the right images?
    python -m tests.bench.serving --only litserve             # one of them again
    python -m tests.bench.serving --tables                    # the tables and plots again, from results.json
    python -m tests.bench.serving --simulated-step-ms 1:20,8:47,32:143  # every call of the network takes that long

ServerSpecs take turns, round after round, and between any two the baseline loop shows what the machine gives just then.
Each peer has a virtual environment DIR/NAME of its own under `--venvs DIR`, with peers/NAME.txt installed and this
project's dependencies visible: `make bench` makes them. Where there is none, the Python that runs this must have it.

With --simulated-step-ms the network's calls are held until so many milliseconds are over (of so many rows, and evenly
between), for a host that is shared: while that is longer than the calls themselves, all servers have as fast a machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from tests.bench.serving import report
from tests.bench.serving.fixed_latency import read
from tests.bench.serving.numbers import score
from tests.bench.serving.phases import Course, Plan, sweep
from tests.bench.serving.server import ROOT
from tests.bench.serving.servers import SERVERS, python_of
from tests.bench.serving.settings import Settings
from tests.bench.serving.workloads import save

SWEPT_BATCHES = (4, 8, 16)
UNSWEPT = 8  # the batch; the wait is the server's second


def say(line: str) -> None:
    """To whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def measure_baseline(told: Settings, seconds: float, *options: str) -> dict[str, Any]:
    """Runs `baseline` in a process of its own. `seconds` for each batch size."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "baseline.json"
        environment = os.environ | replace(told, wait_ms=1e3 * seconds, counter=f"{folder}/counter").variables()
        command = [sys.executable, "-m", "tests.bench.serving.baseline", str(result), *options]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def tuned(told: Settings, name: str, swept: dict[str, Any]) -> Settings:
    """With the server's best settings of the sweep."""
    spec = SERVERS[name]
    rows = [row for row in swept.get(name, []) if math.isfinite(score(row))]
    if rows:
        best = min(rows, key=score)
        return replace(told, batch=best["batch"], wait_ms=best["wait_ms"])
    return replace(told, batch=UNSWEPT, wait_ms=spec.waits_ms[1])


def options() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("build/serving"),
        help="folder of results.json, traces.json, sweep.json, README.md and the plots (default: build/serving)",
    )
    add("--threads", type=int, default=2, help="of torch, in every server (default: 2)")
    add("--checkpoint", default="mnist")
    add("--only", default=",".join(SERVERS), help="servers, by commas; the others keep what --out has of them")
    add("--seconds", type=float, default=24.0, help="of the longest workload; the others are shares of it")
    add("--rounds", type=int, default=3, help="turns of every server (default: 3)")
    add(
        "--workloads", help="only these, by commas: idle, cancels, and the names in traces.json ('own' needs 'backlog')"
    )
    add("--venvs", type=Path, help="folder of virtual environments, one for each peer")
    add("--settings", type=Path, help="a sweep.json, for the peers' settings (default: that in --out)")
    add(
        "--loads", default="", help="of mixed n, more of them, as fractions of capacity: 0.1,0.33 adds 'mixed n at 0.1'"
    )
    add("--simulated-step-ms", type=read, default=(), help="ROWS:MS,…: what the network's calls take, at least")
    add("--sweep", action="store_true", help="only the sweep: batch size × wait of each peer")
    add("--quick", action="store_true", help="only: right images, and a few seconds of load")
    add("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    args.only = args.only.split(",")
    args.loads = [float(load) for load in args.loads.split(",") if load]
    args.workloads = args.workloads and args.workloads.split(",")
    if unknown := set(args.only) - set(SERVERS):
        parser.error(f"no server {', '.join(sorted(unknown))}; there are {', '.join(SERVERS)}")
    return args


def load(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def main() -> None:
    """Runs what was asked for. A signal ends the servers too."""
    args = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    swept = load(args.settings or args.out / "sweep.json")
    if args.tables:
        return report.write(load(args.out / "results.json"), swept, args.out)
    some = set(args.only) != set(SERVERS)
    kept = load(args.out / "results.json") if some and not (args.quick or args.sweep) else {}
    told = Settings(
        0, args.checkpoint, args.threads, rows=16, batch=1, wait_ms=0, queue=1000, deadline_s=600, counter=""
    )
    told = replace(told, step_ms=args.simulated_step_ms)
    say("the baseline loop")
    baseline = measure_baseline(told, 0.5 if args.quick else 10.0)
    if kept:  # the others ran at this load, so these do
        baseline |= {key: kept["baseline"][key] for key in ("step_s", "knee", "capacity", "alone_s")}
        args.seconds, args.rounds = kept["circumstances"]["seconds"], len(kept["rounds"])
    told = replace(told, rows=baseline["knee"])
    say(
        f"capacity {baseline['capacity']:.0f} image-steps/s at the knee, {baseline['knee']} images; "
        f"{baseline['precision']}"
    )
    plan = Plan(baseline, 4.0 if args.quick else args.seconds, loads=args.loads)
    if unknown := set(args.workloads or ()) - {"idle", *plan.traces}:
        sys.exit(f"no workload {', '.join(sorted(unknown))}; there are idle, {', '.join(plan.traces)}")
    circumstances = {
        "date": date.today().isoformat(),
        "threads": args.threads,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": plan.seconds,
        "deadline_s": plan.deadline_s,
        "overload_s": plan.overload_s,
        "step_ms": args.simulated_step_ms,
        "command": shlex.join(["python", "-m", "tests.bench.serving", *sys.argv[1:]]),
    }
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.sweep:
        for name in args.only:
            spec = SERVERS[name]
            if spec.batching:
                say(f"sweep of {spec.title}")
                python = python_of(spec, sys.executable, args.venvs)
                swept[name] = sweep(spec, python, told, plan, SWEPT_BATCHES, say)
        swept["baseline"], swept["circumstances"] = without_pictures(baseline), circumstances
        (args.out / "sweep.json").write_text(json.dumps(swept, indent=1))
        return
    rounds: list[dict[str, Any]] = kept.get("rounds") or [{} for _ in range(1 if args.quick else args.rounds)]
    settings = kept.get("settings", {})
    results = {
        "baseline": without_pictures(baseline),
        "circumstances": circumstances,
        "settings": settings,
        "rounds": rounds,
    }
    for i, found in enumerate(rounds):
        before = 0.0 if args.quick else pace(told)
        for name in args.only[:: 1 if i % 2 == 0 else -1]:  # there and back, so that nobody is always the first
            spec = SERVERS[name]
            chosen = tuned(told, name, swept)
            settings[name] = [chosen.batch, chosen.wait_ms]
            how = f", batch {chosen.batch}, wait {chosen.wait_ms:g} ms" if spec.batching else ""
            say(f"round {i + 1}: {spec.title}{how}")
            course = Course(spec, python_of(spec, sys.executable, args.venvs), chosen, plan, say)
            found[name] = course.run(args.quick, args.workloads)
            if args.quick:
                say(f"  pictures: {found[name].get('pictures')}")
                continue
            after = pace(told)
            say(f"  the baseline loop before and after it: {before:.0f} and {after:.0f} image-steps/s")
            found[name]["pace"], before = [before, after], after
            keep(results, plan, args.out)
    if args.quick:
        failed = [name for name in args.only if "unavailable" in rounds[0][name]]
        sys.exit(f"not available: {', '.join(failed)}" if failed else 0)
    report.write(results, swept, args.out)


def pace(told: Settings) -> float:
    """Image-steps a second of the baseline loop at the knee, just now."""
    return float(measure_baseline(told, 6.0, "--pace")["pace"])


def keep(results: dict[str, Any], plan: Plan, out: Path) -> None:
    """After every server, so that an interrupted run loses one."""
    save(plan.traces, out / "traces.json")
    (out / "results.json").write_text(json.dumps(results, separators=(",", ":")).replace("]],", "]],\n") + "\n")


def without_pictures(baseline: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the baseline loop's measurements."""
    return {key: value for key, value in baseline.items() if key not in ("pictures", "requests")}


if __name__ == "__main__":
    main()
