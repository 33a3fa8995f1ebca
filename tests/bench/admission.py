"""Which requests to admit? Overload replayed through the engine's scheduler in virtual time, with rules for a 504.

    python -m tests.bench.admission [--caps 16,16-32] [--simulated-step-ms 6,6.7,8.8,…] [--out build]

Uniform requests, worth nothing after the deadline, at 1, 2 and 3 times capacity. A rule says how long a new request
will take: who would be late is refused. Requests come while a step runs, and are judged by what is there at that
moment. The rate is that of full batches, known exactly, too low, or too high. Goodput is what came in time, over what
full batches give, when the queue is full.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass

from app.engine.admission import Backlog, estimate_makespan
from app.engine.instance import BatchLimits
from app.engine.request import Request
from app.engine.scheduler import Scheduler
from model import checkpoint
from model.sampling.schedule import SamplingSchedule, make_schedule
from tests.bench.policies import publish, step_options, steps_of
from tests.bench.serving.workloads import Arrival, poisson

SECONDS = 60.0  # of overload
DEADLINE = 10  # times what a request takes alone
MARGIN = 0.85
ERRORS = {0.9: "10 % too low", 1.0: "known", 1.05: "5 % too high"}


@dataclass(frozen=True)
class Queue:
    """What a rule knows: who is there, who comes, and the rate of full batches."""

    there: Scheduler
    new: Request
    rate: float

    @property
    def rows(self) -> int:
        """Images there, with the new ones."""
        return self.new.n + sum(request.n for request in self.there)

    @property
    def seconds(self) -> float:
        """Of those there, none for longer than the new one takes, in full batches."""
        return sum(min(request.remaining_nfe, self.new.remaining_nfe) for request in self.there) / self.rate


def all_of_it(queue: Queue) -> float:
    """What is there, and then the request itself, in full batches."""
    return queue.seconds + queue.new.remaining_nfe / queue.rate


def own_steps(queue: Queue) -> float:
    """The request's steps as long as the batches that it shares; where those are full, after all that is there."""
    most = queue.there.limits.max
    own = len(queue.new.schedule) * min(queue.rows, most) / queue.rate
    return own + (queue.seconds if queue.rows > most else 0.0)


def places(queue: Queue) -> float:
    """Requests with less left to do first, then the request as places get free: what the engine does."""
    backlog = Backlog()
    for request in queue.there:
        backlog.add(request)
    jobs = [*backlog.jobs_up_to(queue.new.remaining_nfe), (queue.new.n, len(queue.new.schedule))]
    backlog.demand.add(queue.new)
    budget = queue.there.limits.budget(backlog.demand)
    return estimate_makespan(jobs, budget) * min(queue.rows, budget) / queue.rate


Rule = Callable[[Queue], float]
RULES: dict[str, Rule] = {
    "(W + w) / rate": all_of_it,
    "W / rate + own steps": own_steps,
    f"(W / rate + own steps) / {MARGIN}": lambda queue: own_steps(queue) / MARGIN,
    "places": places,
    f"**places / {MARGIN}**": lambda queue: places(queue) / MARGIN,
}


def replay(
    scheduler: Scheduler,
    trace: list[Arrival],
    schedules: dict[int, SamplingSchedule],
    step_s: list[float],
    rule: Rule,
    error: float,
) -> tuple[float, int, int]:
    """Goodput as a share of full batches, how many were refused, and how many were admitted and came too late."""
    full = scheduler.limits.max / step_s[scheduler.limits.max]
    deadline_s = DEADLINE * trace[0].steps * step_s[1]
    now, i, work, refused, late = 0.0, 0, 0, 0, 0

    def admit(until: float) -> None:
        nonlocal i, refused
        while i < len(trace) and trace[i].at <= until:
            asked, i = trace[i], i + 1
            request = Request(schedules[asked.steps], 0, 0, asked.n, None, asked.at + deadline_s, None, "")  # type: ignore[arg-type]
            if rule(Queue(scheduler, request, error * full)) > deadline_s:
                refused += 1
            else:
                scheduler.add(request)

    while i < len(trace) or len(scheduler):
        if not len(scheduler):
            now = max(now, trace[i].at)
            admit(now)
            continue
        batch = scheduler.schedule()
        now += step_s[len(batch)]
        admit(now)
        for sample in batch:
            sample.step += 1
            sample.request.remaining_nfe -= 1
        for request in list(scheduler):
            if finished := all(sample.finished for sample in request.samples):
                work += (
                    len(request.schedule) * request.n if now <= request.deadline and deadline_s <= now <= SECONDS else 0
                )
            if finished or now > request.deadline:
                scheduler.remove(request)
                late += now > request.deadline
    return work / (SECONDS - deadline_s) / full, refused, late


def table(step_s: list[float], caps: list[str]) -> str:
    """Markdown."""
    schedules = {20: make_schedule(checkpoint.load("mnist").diffusion, "ddim", 20)}
    lines = [
        "| rows | admitted by | rate | 1×: goodput (refused, late) | 2× | 3× |",
        "|---|---|---|---:|---:|---:|",
    ]
    for cap in caps:
        usual, most = (int(rows) for rows in (cap.split("-") * 2)[:2])
        for name, rule in RULES.items():
            for error in ERRORS:
                cells = []
                for load in (1, 2, 3):
                    trace = poisson("uniform", load * most / step_s[most], SECONDS, seed=load)
                    limits = BatchLimits(most)
                    limits.set(usual, most)
                    scheduler = Scheduler(limits)
                    good, refused, late = replay(scheduler, trace, schedules, step_s, rule, error)
                    cells.append(f"{good:.2f} ({refused}, {late})")
                lines.append(f"| {cap} | {name} | {ERRORS[error]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = step_options(__doc__)
    parser.add_argument("--caps", default="16,16-32", help="rows of a step; of 16-32, 32 for a crowd")
    args = parser.parse_args()
    caps = args.caps.split(",")
    step_s, times = steps_of(args, max(int(rows) for cap in caps for rows in cap.split("-")))
    text = f"""# Admission under overload, compared

`{shlex.join(["python", "-m", "tests.bench.admission", *sys.argv[1:]])}`, in virtual time.
{times}
One image, 20 steps; the deadline is {DEADLINE} times what that takes alone. W is the sum of min(w_j, w) over the
requests present, w the request's own work. Places: those with less left to do go first, then the request, each row in
the place that is free first. Goodput is over that of steps with the most rows.

{table(step_s, caps)}
"""
    publish(text, args.out, "admission.md")


if __name__ == "__main__":
    main()
