"""Which requests to admit? Overload replayed through schedulers in virtual time, with rules for who gets a 504 at once.

    python -m tests.bench.admission [--step_ms 6,6.7,8.8,…] [--out docs/serving]

Uniform requests, worth nothing after the deadline, at 1, 2 and 3 times capacity. A rule says how long a new request
will take, W being Σ min(w_j, w) over those present: who would be late is refused. The rate is that of full batches,
known exactly or 5 % too high. Goodput is what came in time, over what full batches give, when the queue is full.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

from app.engine.request import Request
from app.engine.scheduler import Scheduler
from model import checkpoint
from model.plan import Plan, make_plan
from tests.bench.policies import HalfAndHalf, LeastWork, publish, step_options, steps_of
from tests.bench.serving.workloads import Arrival, poisson

SECONDS = 20.0  # of overload
DEADLINE = 10 / 3  # times the steps of a request in full batches: ten times what it takes alone, or about
MARGIN = 0.85

Rule = Callable[[float, float, float], float]
"""(W + w over the rate, W over the rate, the request's own steps in full batches) → seconds that it will take."""

RULES: dict[str, Rule] = {
    "(W + w) / rate": lambda all_of_it, ahead, own: all_of_it,
    "W / rate + own steps": lambda all_of_it, ahead, own: ahead + own,
    f"(W / rate + own steps) / {MARGIN}": lambda all_of_it, ahead, own: (ahead + own) / MARGIN,
}
POLICIES: dict[str, type[Scheduler]] = {
    "the engine's": Scheduler,
    "half of the steps round robin": HalfAndHalf,
    "least work first": LeastWork,
}


def replay(
    scheduler: Scheduler, trace: list[Arrival], plans: dict[int, Plan], step_s: list[float], rule: Rule, error: float
) -> tuple[float, int, int]:
    """Goodput as a share of full batches, how many were refused, and how many were admitted and came too late."""
    full = step_s[scheduler.max_rows] / error
    rate, deadline_s = scheduler.max_rows / full, DEADLINE * trace[0].steps * step_s[scheduler.max_rows]
    now, i, work, refused, late = 0.0, 0, 0, 0, 0
    while i < len(trace) or len(scheduler):
        if not len(scheduler):
            now = max(now, trace[i].at)
        while i < len(trace) and trace[i].at <= now:
            asked, i = trace[i], i + 1
            ahead = sum(min(other.work_left, asked.work) for other in scheduler)
            if rule((ahead + asked.work) / rate, ahead / rate, asked.steps * full) > asked.at + deadline_s - now:
                refused += 1
                continue
            scheduler.add(Request(plans[asked.steps], 0, 0, asked.n, None, asked.at + deadline_s, None, None))  # type: ignore[arg-type]
        for request in scheduler:
            if now > request.deadline:
                scheduler.remove(request)
                late += 1
        if not len(scheduler):
            continue
        batch = scheduler.schedule()
        now += step_s[len(batch)]
        for sample in batch:
            sample.step += 1
            sample.request.work_left -= 1
        for request in {sample.request for sample in batch if sample.finished}:
            scheduler.remove(request)
            late += now > request.deadline
            work += len(request.plan) if now <= request.deadline and deadline_s <= now <= SECONDS else 0
    return work / (SECONDS - deadline_s) / (scheduler.max_rows / step_s[scheduler.max_rows]), refused, late


def table(step_s: list[float], cap: int) -> str:
    """Markdown."""
    plans = {20: make_plan(checkpoint.load("mnist").diffusion, "ddim", 20)}
    lines = [
        "| policy | admitted by | rate | 1×: goodput (refused, late) | 2× | 3× |",
        "|---|---|---|---:|---:|---:|",
    ]
    for policy, scheduler in POLICIES.items():
        for name, rule in RULES.items():
            for error in (1.0, 1.05):
                cells = []
                for load in (1, 2, 3):
                    trace = poisson("uniform", load * cap / step_s[cap], SECONDS, seed=load)
                    good, refused, late = replay(scheduler(cap), trace, plans, step_s, rule, error)
                    cells.append(f"{good:.2f} ({refused}, {late})")
                known = "known" if error == 1 else "5 % too high"
                lines.append(f"| {policy} | {name} | {known} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = step_options(__doc__)
    parser.add_argument("--cap", type=int, default=8, help="images in a step (default: 8)")
    args = parser.parse_args()
    step_s, times = steps_of(args, args.cap)
    text = f"""# Admission under overload, compared

`{shlex.join(["python", "-m", "tests.bench.admission", *sys.argv[1:]])}`, in virtual time.
{times}
One image, 20 steps. W is the sum of min(w_j, w) over the requests present, w the request's own work.

{table(step_s, args.cap)}
"""
    publish(text, args.out, "admission.md")


if __name__ == "__main__":
    main()
