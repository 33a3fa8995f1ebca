"""Writes dashboards/ddpm.json: `python docker/grafana/dashboard.py`, with Grafana's own builders.

Needs grafana-foundation-sdk==1769699379!11.6.0 (the newest schema on PyPI; Grafana itself takes older ones to its own).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphDrawStyle, LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableHide, VariableRefresh

TARGET = Path(__file__).parent / "dashboards" / "ddpm.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
REPLICA = 'job="ddpm", instance=~"$replica"'
MODEL = f'{REPLICA}, model=~"$model"'
SAMPLING = f'{REPLICA}, model=~"$model|", endpoint=~"/generate|/diffusion-sequence"'


def rate(metric: str, by: str, labels: str = MODEL) -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantiles(histogram: str, labels: str = MODEL) -> list[tuple[str, str]]:
    buckets = rate(histogram + "_bucket", "le", labels)
    return [(f"histogram_quantile({q / 100}, {buckets})", f"p{q}") for q in (50, 95, 99)]


def mean(histogram: str, by: str, labels: str = MODEL) -> str:
    return f"{rate(histogram + '_sum', by, labels)} / ({rate(histogram + '_count', by, labels)} > 0)"


@dataclass
class Graph:
    """A panel over time. `text` says how to read it."""

    title: str
    text: str
    unit: str
    queries: list[tuple[str, str]]
    stacked: bool = False
    width: int = 8


ROWS: dict[str, list[Graph]] = {
    "Traffic": [
        Graph(
            "Requests by outcome",
            "Sampling requests that ended, by ok or their error's code.",
            "reqps",
            [(rate("ddpm_requests_total", "outcome", SAMPLING), "{{outcome}}")],
            stacked=True,
        ),
        Graph(
            "Refused and failed",
            "Part of all sampling requests. 429 and 504 are refusals; errors are the service's own.",
            "percentunit",
            [("ddpm:refused_ratio:5m", "refused"), ("ddpm:error_ratio:5m", "failed")],
        ),
        Graph(
            "Images",
            "Images that reached their clients, by model.",
            "ops",
            [(rate("ddpm_images_total", "model"), "{{model}}")],
            stacked=True,
        ),
    ],
    "Latency": [
        Graph(
            "Request",
            "From a request's arrival to the last byte of its answer; ok ones of /generate.",
            "s",
            quantiles("ddpm_e2e_request_latency_seconds", f'{MODEL}, endpoint="/generate", outcome="ok"'),
        ),
        Graph(
            "Queue against compute",
            "The mean request: waiting for its first step, and the rest of its time.",
            "s",
            [
                (mean("ddpm_request_queue_time_seconds", "model"), "queue {{model}}"),
                (
                    mean(
                        "ddpm_e2e_request_latency_seconds",
                        "model",
                        f'{MODEL}, endpoint=~"/generate|/diffusion-sequence", outcome="ok"',
                    )
                    + f" - {mean('ddpm_request_queue_time_seconds', 'model')}",
                    "compute and answer {{model}}",
                ),
            ],
            stacked=True,
        ),
        Graph("Queue", "From admission to the first step.", "s", quantiles("ddpm_request_queue_time_seconds")),
        Graph(
            "First frame",
            "Of a stream: from admission until it can be sent.",
            "s",
            quantiles("ddpm_time_to_first_frame_seconds"),
        ),
        Graph(
            "Encoding",
            "Making a PNG, GIF, WebP or zip, beside the engine.",
            "s",
            quantiles("ddpm_encode_seconds", REPLICA),
        ),
        Graph(
            "Oldest wait",
            "How long the request waits that waits longest for its first step.",
            "s",
            [(f"ddpm_oldest_queued_request_age_seconds{{{REPLICA}}}", "{{instance}}")],
        ),
    ],
    "Engine": [
        Graph("Step", "One network call and the update of every image in it.", "s", quantiles("ddpm_step_seconds")),
        Graph(
            "Image-steps",
            "The device's real throughput: steps, counted per image.",
            "ops",
            [(rate("ddpm_image_steps_total", "instance, model"), "{{model}} {{instance}}")],
            stacked=True,
        ),
        Graph(
            "Network rows",
            "What the network computes: one row for each image and step, two where guidance acts.",
            "ops",
            [(rate("ddpm_nfe_total", "instance, model"), "{{model}} {{instance}}")],
            stacked=True,
        ),
        Graph(
            "Batch fill",
            "Rows of a mean batch over its room for them. Low under load: requests come one by one.",
            "percentunit",
            [(mean("ddpm_batch_utilization", "instance, model"), "{{model}} {{instance}}")],
        ),
        Graph(
            "Rows of a batch",
            "The mean batch, and the most it may have.",
            "none",
            [
                (mean("ddpm_batch_size", "instance, model"), "{{model}} {{instance}}"),
                (f"max by (model) (ddpm_max_batch_size{{{MODEL}}})", "limit {{model}}"),
            ],
        ),
        Graph(
            "Running and waiting",
            "Images in the present step, and admitted ones outside of it.",
            "none",
            [
                (f"sum by (model) (ddpm_num_samples_running{{{MODEL}}})", "running {{model}}"),
                (f"sum by (model) (ddpm_num_samples_waiting{{{MODEL}}})", "waiting {{model}}"),
            ],
            stacked=True,
        ),
        Graph(
            "Time to work off the queue",
            "Admitted work over the rate of late steps. Requests above their time-out are refused with 504.",
            "s",
            [(f"ddpm:drain_seconds{{{REPLICA}}}", "{{instance}}")],
        ),
    ],
    "Cancels, waste, frames": [
        Graph(
            "Cancelled requests",
            "Their clients left before the answer.",
            "reqps",
            [(rate("ddpm_cancellation_latency_seconds_count", "model"), "{{model}}")],
        ),
        Graph(
            "Cancel latency",
            "From a client's leaving to the freeing of its places: about a step.",
            "s",
            quantiles("ddpm_cancellation_latency_seconds"),
        ),
        Graph(
            "Wasted image-steps",
            "Of requests that ended without images, by what ended them.",
            "ops",
            [(rate("ddpm_wasted_image_steps_total", "outcome"), "{{outcome}}")],
            stacked=True,
        ),
        Graph(
            "Frames",
            "Of sequences: sent, and dropped because the client was too slow for them.",
            "ops",
            [
                (rate("ddpm_frames_sent_total", "model"), "sent"),
                (rate("ddpm_frames_dropped_total", "model"), "dropped"),
            ],
            width=12,
        ),
        Graph(
            "Failures",
            "Steps that raised, and engine restarts, within five minutes.",
            "none",
            [
                (f"sum by (instance) (increase(ddpm_failed_steps_total{{{MODEL}}}[5m]))", "failed steps {{instance}}"),
                (f"increase(ddpm_engine_restarts_total{{{REPLICA}}}[5m])", "engine restarts {{instance}}"),
            ],
            width=12,
        ),
    ],
    "Device and process": [
        Graph(
            "Device memory",
            "Used of what there is. On a CPU: of the process.",
            "bytes",
            [(f"ddpm_device_memory_bytes{{{REPLICA}}}", "{{kind}} {{device}} {{instance}}")],
        ),
        Graph(
            "Memory of the process",
            "Resident.",
            "bytes",
            [(f"process_resident_memory_bytes{{{REPLICA}}}", "{{instance}}")],
        ),
        Graph(
            "Descriptors", "Open files and connections.", "none", [(f"process_open_fds{{{REPLICA}}}", "{{instance}}")]
        ),
        Graph(
            "CPU",
            "Cores in use.",
            "none",
            [(f"rate(process_cpu_seconds_total{{{REPLICA}}}[$__rate_interval])", "{{instance}}")],
        ),
        Graph(
            "Age of the present step",
            "0 between steps. One that is far older than steps take is a stall.",
            "s",
            [(f"ddpm_current_step_age_seconds{{{REPLICA}}}", "{{instance}}")],
        ),
        Graph(
            "Event loop",
            "How long it was busy with something else when somebody came, and the longest of the last minute.",
            "s",
            [
                *quantiles("ddpm_event_loop_lag_seconds", REPLICA),
                (f"ddpm_event_loop_max_lag_seconds{{{REPLICA}}}", "longest {{instance}}"),
            ],
        ),
        Graph(
            "Replicas at the balancer",
            "Those that it sends requests to, and its requests to each.",
            "none",
            [
                ('haproxy_backend_active_servers{proxy="replicas"}', "ready"),
                ('sum by (server) (haproxy_server_current_sessions{proxy="replicas"}) > 0', "requests at {{server}}"),
            ],
        ),
    ],
}

STATS = [
    ("Replicas ready", 'sum(ddpm_ready{job="ddpm"})', "none", ""),
    ("Requests", f"sum(rate(ddpm_requests_total{{{SAMPLING}}}[$__rate_interval]))", "reqps", ""),
    ("Images", f"sum(rate(ddpm_images_total{{{MODEL}}}[$__rate_interval]))", "ops", ""),
    ("p95 of a request", "max(ddpm:request_seconds:p95_5m)", "s", ""),
    ("Firing alerts", 'count(ALERTS{alertstate="firing", alertname=~"DDPM.*"}) or vector(0)', "none", ""),
    (
        "Models",
        f"group by (model, sha256, device) (ddpm_model_info{{{MODEL}}})",
        "none",
        "{{model}} {{sha256}} {{device}}",
    ),
    (
        "Versions",
        f"group by (version, python, torch) (ddpm_build_info{{{REPLICA}}})",
        "none",
        "{{version}}, torch {{torch}}",
    ),
]


def query(expression: str, legend: str, ref: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(ref).datasource(SOURCE)


def graph(spec: Graph) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(spec.title)
        .description(spec.text)
        .unit(spec.unit)
        .min(0)
        .datasource(SOURCE)
        .span(spec.width)
        .height(7)
        .draw_style(GraphDrawStyle.LINE)
        .fill_opacity(25 if spec.stacked else 5)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if spec.stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for i, (expression, legend) in enumerate(spec.queries):
        panel = panel.with_target(query(expression, legend, chr(ord("A") + i)))
    return panel


def variable(name: str, label: str, metric: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({metric}, {name if name == 'model' else 'instance'})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .hide(VariableHide.DONT_HIDE)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def build() -> str:
    board = (
        dashboard.Dashboard("ddpm-serve")
        .uid("ddpm")
        .tags(["ddpm"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .readonly()
        .with_variable(variable("model", "Model", 'ddpm_model_info{job="ddpm"}'))
        .with_variable(variable("replica", "Replica", 'ddpm_ready{job="ddpm"}'))
    )
    for title, expression, unit, legend in STATS:
        panel = stat.Panel().title(title).unit(unit).datasource(SOURCE).span(3 if not legend else 4).height(4)
        if legend:
            panel = panel.text_mode("name").color_mode("none")
        board = board.with_panel(panel.with_target(query(expression, legend, "A").instant()))
    for title, graphs in ROWS.items():
        board = board.with_row(dashboard.Row(title))
        for spec in graphs:
            board = board.with_panel(graph(spec))
    built = board.build()
    for i, panel in enumerate(built.panels or [], start=1):
        panel.id_val = i
    return JSONEncoder(sort_keys=True, indent=1).encode(built) + "\n"


if __name__ == "__main__":
    TARGET.write_text(build())
