"""Tables in Markdown, and the plots beside them, from what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.serving import plots
from tests.bench.serving.numbers import (
    first_pictures,
    goodput,
    latencies,
    middle,
    outcomes,
    percentile,
    recovery,
    score,
    summary,
    turns,
)
from tests.bench.serving.servers import SERVERS
from tests.bench.serving.workloads import Arrival, load, replace_time

MIXED = ("mixed steps", "mixed n")
TITLES = {
    "uniform": "Uniform: one image, 20 steps",
    "mixed steps": "Mixed steps: one image, 10, 20, 50 or 200 steps, as often",
    "mixed n": "Mixed n: one image or 16, 20 steps, as often",
}
BARS = {"p50": ("median latency", 0.5), "slow95": ("p95 slowdown", 0.25), "p95": ("p95 latency", 1.0)}

TracingMiddleware = dict[str, list[Arrival]]
Results = dict[str, Any]


def write(results: Results, swept: Results, out: Path) -> None:
    """README.md, latency.png and overload.png in `out`."""
    traces = load(out / "traces.json")
    plots.latency(results, traces, out / "latency.png")
    plots.overload(results, traces, out / "overload.png")
    sections = {name: f"## {TITLES[name]}\n\n{_workload(results, traces, name)}" for name in ("uniform", *MIXED)}
    sections |= {"mixed n at ": _loads(results, traces)}
    sections |= {"own ": _own(results, traces), "bursts": _bursts(results, traces)}
    sections |= {"overload ": _overload(results, traces), "frames": _frames(results), "cancels": _cancels(results)}
    sections |= {"idle_s": _idle(results)}
    ran = {key for found in results["rounds"] for turn in found.values() for key in turn}
    measured = [text for start, text in sections.items() if any(key.startswith(start) for key in ran)]
    text = "\n\n".join([_head(results), _bar(results, traces), *measured, _sweep(swept)])
    (out / "README.md").write_text(text + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """Three digits; — for what never came."""
    if not math.isfinite(value):
        return "—"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def title(name: str, results: Results) -> str:
    """In bold: ours; with the settings: those that batch."""
    spec = SERVERS[name]
    if spec.batching and name in results["settings"]:
        batch, wait_ms = results["settings"][name]
        return f"{spec.title} ({batch}, {wait_ms:g} ms)"
    return f"**{spec.title}**" if name == "ours" else spec.title


def rows(results: Results, key: str, cells: Callable[[str, list[Results]], list[str]], columns: int) -> list[list[str]]:
    """One for each server; where it never got as far as `key`, the reason."""
    lines = []
    for name in servers(results):
        if found := turns(results, name, key):
            lines.append([title(name, results), *cells(name, found)])
        else:
            reasons = [found["unavailable"] for found in turns(results, name, "unavailable")]
            reason = (reasons or ["not measured"])[-1].replace("|", "/")[:160]
            lines.append([SERVERS[name].title, reason, *[""] * (columns - 1)])
    return lines


def servers(results: Results) -> list[str]:
    """Those that had a turn."""
    return [name for name in SERVERS if any(name in found for found in results["rounds"])]


def spread(ratios: Sequence[float]) -> str:
    """The median, and between which they lie if there are several."""
    if len(ratios) == 1:
        return number(ratios[0])
    return f"{number(statistics.median(ratios))} ({number(min(ratios))}–{number(max(ratios))})"


def _head(results: Results) -> str:
    baseline, where = results["baseline"], results["circumstances"]
    steps = table(
        ["images in the batch", *baseline["step_s"]],
        [
            ["ms a step", *(number(1e3 * s) for s in baseline["step_s"].values())],
            ["image-steps/s", *(number(int(n) / s) for n, s in baseline["step_s"].items())],
        ],
    )
    pictures = [turn["pictures"] for name in SERVERS for turn in turns(results, name, "pictures")]
    paces = [pace for name in SERVERS for turn in turns(results, name, "pace") for pace in turn["pace"]]
    calls = [turn["calls"] for name in SERVERS for turn in turns(results, name, "calls")]
    command = where.get("command", "python -m tests.bench.serving")
    steady = _steady(where["step_ms"], calls) if calls else ""
    worst = max((p["mean_levels"] for p in pictures), default=0), max((p["far_share"] for p in pictures), default=0)
    return f"""# Serving, compared

`{command}` made this page on {where["date"]}. Machine: {where["cores"]} cores
of an {baseline["processor"]}, no GPU; torch {baseline["torch"]}, {where["threads"]} threads in every server,
{baseline["precision"]}, checkpoint {baseline["checkpoint"][:8]}…, DDIM without guidance. Everything that was sent is in
`traces.json`, every answer's times in `results.json`.

{steady}\
- **Arrivals** are an open loop: the generator, a process of its own, does not wait for answers, and latencies count
  from the moment when a request was meant to be sent. All servers get the same trace, seeds and all.
- **Rounds**: {len(results["rounds"])}. ServerSpecs take turns; a number is the median of its rounds', counts are sums,
  and in brackets behind a ratio is what its rounds lie between.
- **Capacity** is that of `model.sampling.sample` in a loop at its knee batch, {baseline["knee"]} images, without a
  server: {number(baseline["capacity"])} image-steps/s before the run. Loads are fractions of it. The loop ran again
  before and after the servers' turns, with a median of {number(statistics.median(paces))} image-steps/s, from
  {number(min(paces))} to {number(max(paces))}: so steady was the machine. "Of the baseline" is over the mean of
  both.
- **Slowdown** is latency over what the baseline loop takes for the request alone, the same for all.
- A request without an answer took infinitely long (—) and counts in every percentile.
- **Peers** run the same network function, weights, loop and precision, and group a batch by plan: see
  `tests/bench/serving/backend.py`. In brackets: batch size and wait, the best of the sweep below. *Ours, batching
  requests* is our server with another scheduler: whole requests of one plan.
- **Pictures**: before anything is timed, each server must give those of the baseline loop, asked for all at once. The
  furthest was {worst[0]:.2f} grey levels off in the mean of a picture, with {worst[1]:.1%} of its pixels off by more
  than two.

{steps}"""


def _steady(step_ms: Sequence[Sequence[float]], calls: Sequence[Sequence[float]]) -> str:
    """What was done so that the machine is as fast for everybody, and whether it was enough."""
    times = ", ".join(f"{rows:g}: {ms:g}" for rows, ms in step_ms)
    worst = max(lost / told for _, _, lost, told in calls)
    count, late, lost, told = (sum(column) for column in zip(*calls, strict=True))
    return f"""- **Fixed latency**: every call of the network, in all servers and the baseline loop, is held until so
  many milliseconds are over, by its rows and evenly between: {times}.
  Of {count:.0f} calls of servers {late / count:.2%} took longer by themselves, which made them {lost / told:.2%}
  longer in all, and for the server that fared worst in a round {worst:.2%}. The cores are free for the rest of a
  call, for everybody's server and generator.
"""


def _summaries(results: Results, traces: TracingMiddleware, name: str) -> dict[str, list[dict[str, float]]]:
    """By server, of each of its rounds."""
    alone = results["baseline"]["alone_s"]
    found = {who: turns(results, who, name) for who in SERVERS}
    return {who: [summary(traces[name], turn[name], alone) for turn in ran] for who, ran in found.items() if ran}


def _bar(results: Results, traces: TracingMiddleware) -> str:
    lines = []
    for name in MIXED:
        rounds = _summaries(results, traces, name)
        peers = {who: middle(found) for who, found in rounds.items() if SERVERS[who].batching}
        if "ours" not in rounds or not peers:
            continue

        def ratios(key: str, best: str, name: str = name) -> list[float]:
            both = [found for found in results["rounds"] if all(name in found.get(who, {}) for who in ("ours", best))]
            ours, theirs = (_summaries({**results, "rounds": both}, traces, name)[who] for who in ("ours", best))
            return [one[key] / other[key] for one, other in zip(ours, theirs, strict=True)]

        for key, (what, bar) in BARS.items():
            best = min(peers, key=lambda who: peers[who][key])
            found = ratios(key, best)
            met = _verdict(statistics.median(found) <= bar)
            lines.append([f"{name}: {what}", spread(found), f"≤ {bar:g}", met, SERVERS[best].title])
        best = max(peers, key=lambda who: peers[who]["images_s"])
        found = ratios("images_s", best)
        met = _verdict(statistics.median(found) >= 0.995)
        lines.append([f"{name}: images/s", spread(found), "≥ 1", met, SERVERS[best].title])
    where, shares = results["circumstances"], {}
    if ran := [turn for turn in turns(results, "ours", "overload 2") if {"pace", "capacity"} <= set(turn)]:
        trace, late, until = traces["overload 2"], where["deadline_s"], where["overload_s"]
        good = [goodput(trace, turn["overload 2"], late, until) for turn in ran]
        of_baseline = [each / statistics.mean(turn["pace"]) for each, turn in zip(good, ran, strict=True)]
        of_own = [each / turn["capacity"]["uniform"] for each, turn in zip(good, ran, strict=True)]
        shares["goodput at 2× overload, of the baseline"] = of_baseline
        shares["goodput at 2× overload over its own capacity"] = of_own
        own = [turn["capacity"]["uniform"] / statistics.mean(turn["pace"]) for turn in ran]
        shares["images/s through HTTP, saturated, of the baseline"] = own
    lines += [
        [what, spread(found), "≥ 0.95", _verdict(statistics.median(found) >= 0.95), ""]
        for what, found in shares.items()
    ]
    head = ["at 75 % load, ours over the best batching peer's", "ratio", "bar", "", "the best peer"]
    return f"## Targets\n\n{table(head, lines)}\n\n![latency](latency.png)"


def _verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def _workload(results: Results, traces: TracingMiddleware, name: str) -> str:
    summaries = _summaries(results, traces, name)

    def cells(who: str, _: list[Results]) -> list[str]:
        s = middle(summaries[who])
        times = [number(1e3 * s[key]) for key in ("p50", "p95", "p99")]
        slow = [number(s["slow50"]), number(s["slow95"])]
        return [number(s["images_s"]), *times, *slow, f"{s['failed']:.0f} of {s['requests']:.0f}"]

    head = ["75 % of capacity", "images/s", "p50 ms", "p95 ms", "p99 ms", "p50 slowdown", "p95 slowdown", "unanswered"]
    return table(head, rows(results, name, cells, 7))


def _loads(results: Results, traces: TracingMiddleware) -> str:
    parts = []
    for name in (name for name in traces if name.startswith("mixed n at ")):

        def cells(_: str, found: list[Results], name: str = name) -> list[str]:
            kinds = [(1, 16), (1,), (16,)]
            ran = [[_of_sizes(traces[name], turn[name], sizes) for sizes in kinds] for turn in found]
            times = [[1e3 * percentile(of, p) for of in turn for p in (50, 95)] for turn in ran]
            return [number(statistics.median(column)) for column in zip(*times, strict=True)]

        head = [f"{name}, ms", "p50", "p95", "1 image: p50", "p95", "16 images: p50", "p95"]
        parts.append(table(head, rows(results, name, cells, 6)))
    return "\n\n".join(["## Mixed n by load", *parts])


def _of_sizes(trace: Sequence[Arrival], records: Sequence[Sequence[Any]], sizes: Sequence[int]) -> np.ndarray:
    """Latencies of the requests for so many images."""
    return latencies([record for arrival, record in zip(trace, records, strict=True) if arrival.n in sizes])


def _own(results: Results, traces: TracingMiddleware) -> str:
    parts = []
    for kind in MIXED:

        def cells(_: str, found: list[Results], kind: str = kind) -> list[str]:
            summaries, owns = [], []
            for turn in found:
                stretch = results["baseline"]["capacity"] / turn["capacity"][kind]
                trace = [replace_time(a, a.at * stretch) for a in traces[f"own {kind}"]]
                summaries.append(summary(trace, turn[f"own {kind}"], results["baseline"]["alone_s"]))
                owns.append(turn["capacity"][kind] / statistics.mean(turn["pace"]))
            s = middle(summaries)
            times = [number(1e3 * s[key]) for key in ("p50", "p95")]
            return [spread(owns), number(s["images_s"]), *times, number(s["slow95"])]

        head = [kind, "its capacity, of the baseline", "images/s", "p50 ms", "p95 ms", "p95 slowdown"]
        parts.append(table(head, rows(results, f"own {kind}", cells, 5)))
    note = "Capacity is what a backlog of the workload runs at; each server then gets 75 % of its own."
    return "\n\n".join(["## Each at 75 % of its own capacity", note, *parts])


def _bursts(results: Results, traces: TracingMiddleware) -> str:
    summaries = _summaries(results, traces, "bursts")

    def cells(who: str, _: list[Results]) -> list[str]:
        s = middle(summaries[who])
        return [*(number(1e3 * s[key]) for key in ("p50", "p95", "p99")), number(s["slow95"])]

    every = results["circumstances"]["seconds"] / 15
    note = f"Half of capacity, but the uniform requests of every {every:g} s come at one moment."
    head = ["", "p50 ms", "p95 ms", "p99 ms", "p95 slowdown"]
    return f"## Bursts\n\n{note}\n\n{table(head, rows(results, 'bursts', cells, 4))}"


def _overload(results: Results, traces: TracingMiddleware) -> str:
    where, capacity = results["circumstances"], results["baseline"]["capacity"]
    late, until = where["deadline_s"], where["overload_s"]
    levels = [name for name in traces if any(turns(results, who, name) for who in SERVERS) and "overload" in name]
    lines = []
    for who in servers(results):
        line = [title(who, results)]
        for name in levels:
            good = [goodput(traces[name], turn[name], late, until) for turn in turns(results, who, name)]
            line += [f"{statistics.median(good) / capacity:.2f}" if good else "not measured"]
        worst = next((name for name in ("overload 2", "overload 3") if turns(results, who, name)), None)
        if worst:
            trace = traces[worst]
            ran = [turn[worst] for turn in turns(results, who, worst)]
            during = [[r for a, r in zip(trace, records, strict=True) if a.at < until] for records in ran]
            answered = [latencies([r for r in records if r[0] == 200]) for records in during]
            p95 = [percentile(within, 95) for within in answered if len(within)]
            refused, silent = (statistics.median(share) for share in zip(*map(outcomes, during), strict=True))
            back = max(recovery(trace, records, late, until) for records in ran)
            line += [number(1e3 * statistics.median(p95)) if p95 else "—"]
            line += [f"{refused:.0%}", f"{silent:.0%}", number(back) if math.isfinite(back) else "not in time"]
        else:
            line += [""] * 4
        lines.append(line)
    head = ["goodput, of capacity", *(f"{name.split()[1]}×" for name in levels)]
    head += ["at 2×: p95 ms of the answered", "refused", "given up", "longest recovery, s"]
    note = f"""Uniform requests, worth nothing after {late:g} s: then the client leaves. Goodput is the work of the
images that came in time, from {late:g} s to {until:g} s after the start, over the baseline loop's
capacity. Recovery is counted from the end of the overload, at half of capacity, to the last request
that is not answered in time. Ours is told the deadline by the client (`timeout_s`); LitServe, Ray
Serve, BentoML and mosec are told it by their settings, and with it how many requests to hold where
they have a setting for it."""
    return f"## Overload\n\n{note}\n\n{table(head, lines)}\n\n![goodput](overload.png)"


def _frames(results: Results) -> str:
    def cells(who: str, found: list[Results]) -> list[str]:
        pictures = [(first_pictures(turn["frames"]), latencies(turn["frames"])) for turn in found]
        times = [[1e3 * percentile(of, p) for of in both for p in (50, 95)] for both in pictures]
        medians = [number(statistics.median(column)) for column in zip(*times, strict=True)]
        return ["5 frames" if SERVERS[who].stream else "the whole answer", *medians]

    note = """Uniform requests at half of capacity; who can shows five predictions of the image on the way.
LitServe, Ray Serve and mosec have streams too; they are not used, as a batch is carried out plan
after plan in one call."""
    head = ["", "first picture is", "first p50 ms", "first p95 ms", "last p50 ms", "last p95 ms"]
    return f"## Time to the first frame\n\n{note}\n\n{table(head, rows(results, 'frames', cells, 5))}"


def _cancels(results: Results) -> str:
    def cells(_: str, found: list[Results]) -> list[str]:
        total = {key: sum(turn["cancels"][key] for turn in found) for key in found[0]["cancels"]}
        wasted = total["computed"] - total["wanted"]
        share = wasted / total["asked_of_those"] if total["asked_of_those"] else 0.0
        metric = f"{total['metric']:.0f}" if "metric" in total else ""
        return [f"{total['left']}", f"{total['asked_of_those']}", f"{wasted}", f"{share:.0%}", metric]

    note = "Mixed steps at half of capacity; every other client leaves early. Wasted is what was computed for nobody."
    head = ["", "clients that left", "image-steps they asked for", "wasted", "share", "by our metric"]
    return f"## Clients that leave\n\n{note}\n\n{table(head, rows(results, 'cancels', cells, 5))}"


def _idle(results: Results) -> str:
    kinds = list(results["baseline"]["alone_s"])
    baseline = ["the baseline loop", *(number(1e3 * results["baseline"]["alone_s"][kind]) for kind in kinds)]

    def cells(_: str, found: list[Results]) -> list[str]:
        return [number(1e3 * statistics.median(turn["idle_s"][kind] for turn in found)) for kind in kinds]

    head = ["ms", *(f"{k.split('x')[0]} of {k.split('x')[1]} steps" for k in kinds)]
    return f"## Alone on an idle server\n\n{table(head, [baseline, *rows(results, 'idle_s', cells, len(kinds))])}"


def _sweep(swept: Results) -> str:
    lines = []
    for name, settings in swept.items():
        if name not in SERVERS:
            continue
        best = min(settings, key=score)
        for row in settings:
            mark = "**" if row is best and "unavailable" not in row else ""
            line = [f"{mark}{SERVERS[name].title}{mark}", str(row["batch"]), f"{row['wait_ms']:g}"]
            if "unavailable" in row:
                lines.append([*line, row["unavailable"].replace("|", "/")[:160], *[""] * 4])
                continue
            for kind in MIXED:
                line += [number(1e3 * row[kind]["p50"]), number(1e3 * row[kind]["p95"])]
            lines.append([*line, number(1e3 * score(row))])
    head = ["", "batch", "wait ms", "steps: p50 ms", "p95 ms", "n: p50 ms", "p95 ms", "geometric mean"]
    note = """`python -m tests.bench.serving --sweep`: both mixed workloads at 75 % of the baseline
loop's capacity. The best, in bold, is that of the least geometric mean. BentoML's wait is
`max_latency_ms`, within which it decides itself."""
    ran = swept.get("circumstances", {})
    when = f" On {ran['date']}; capacity {number(swept['baseline']['capacity'])} image-steps/s." if ran else ""
    return f"## The sweep\n\n{note}{when}\n\n{table(head, lines)}" if lines else "## The sweep\n\nNot run."
