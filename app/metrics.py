"""Every Prometheus instrument, declared once. Base units, `_total` on counters, bounded labels."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
LAG_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RATIO = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


@dataclass(frozen=True)
class ModelStatus:
    """A model at the moment of a scrape."""

    name: str
    num_samples_running: int
    num_samples_waiting: int
    max_batch_size: int


@dataclass(frozen=True)
class EngineStatus:
    """The engine at the moment of a scrape."""

    ready: bool
    stalled: bool
    current_step_age: float
    oldest_queued_request_age: float
    pending_nfe: int
    estimated_nfe_per_second: float
    models: list[ModelStatus]


ENGINE_GAUGES = {  # field of EngineStatus → metric, help
    "ready": ("ddpm_ready", "1 when /readyz says yes."),
    "stalled": ("ddpm_engine_stalled", "1 while a step takes far longer than expected."),
    "current_step_age": (
        "ddpm_current_step_age_seconds",
        "How long the current step has been running; 0 between steps.",
    ),
    "oldest_queued_request_age": (
        "ddpm_oldest_queued_request_age_seconds",
        "How long the oldest queued request has waited for its first step; 0 if none waits.",
    ),
    "pending_nfe": (
        "ddpm_pending_nfe",
        "Pending work in network rows (NFE): images x steps, twice that with guidance.",
    ),
    "estimated_nfe_per_second": (
        "ddpm_estimated_nfe_per_second",
        "Throughput of full batches that admission expects, in network rows (NFE) per second.",
    ),
}
MODEL_GAUGES = {  # field of ModelStatus → metric, help
    "num_samples_running": ("ddpm_num_samples_running", "Images in the batch of the current step."),
    "num_samples_waiting": ("ddpm_num_samples_waiting", "Admitted images outside the batch of the current step."),
    "max_batch_size": ("ddpm_max_batch_size", "Maximum number of network rows per step."),
}


class EngineCollector(Collector):
    """Asks the engine at every scrape, so that no step sets a gauge."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering it asks the engine nothing."""
        return []

    def collect(self) -> Iterable[Metric]:
        """A gauge for each field."""
        status = self._status()
        for field, (name, text) in ENGINE_GAUGES.items():
            yield GaugeMetricFamily(name, text, value=float(getattr(status, field)))
        for field, (name, text) in MODEL_GAUGES.items():
            family = GaugeMetricFamily(name, text, labels=["model"])
            for model in status.models:
                family.add_metric([model.name], getattr(model, field))
            yield family


class EngineMetrics:
    """What the engine thread does. The label `model` is the checkpoint's name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r, model = registry, ["model"]
        self.step_seconds = Histogram(
            "ddpm_step_seconds", "Duration of a denoising step of one batch.", model, buckets=STEP_SECONDS, registry=r
        )
        self.batch_size = Histogram(
            "ddpm_batch_size", "Network rows in a step's batch.", model, buckets=BATCH_SIZES, registry=r
        )
        self.batch_utilization = Histogram(
            "ddpm_batch_utilization",
            "Network rows in a step's batch, as a fraction of the maximum.",
            model,
            buckets=RATIO,
            registry=r,
        )
        self.queue_seconds = Histogram(
            "ddpm_request_queue_time_seconds",
            "Time from the admission of a request to its first step.",
            model,
            buckets=SECONDS,
            registry=r,
        )
        self.cancellation_latency = Histogram(
            "ddpm_cancellation_latency_seconds",
            "Time from a client's disconnect to the end of its request.",
            model,
            buckets=STEP_SECONDS,
            registry=r,
        )
        self.image_steps = Counter("ddpm_image_steps_total", "Denoising steps, counted per image.", model, registry=r)
        self.nfe = Counter("ddpm_nfe_total", "Network rows that denoising steps computed (NFE).", model, registry=r)
        self.images = Counter("ddpm_images_total", "Images of requests that succeeded.", model, registry=r)
        self.wasted_steps = Counter(
            "ddpm_wasted_image_steps_total",
            "Image-steps of requests that did not succeed, by outcome.",
            ["model", "outcome"],
            registry=r,
        )
        self.failed_steps = Counter("ddpm_failed_steps_total", "Steps that raised an exception.", model, registry=r)
        self.restarts = Counter("ddpm_engine_restarts_total", "Times the engine failed outside a step.", registry=r)
        self.memory_bytes = Gauge(
            "ddpm_device_memory_bytes",
            "Device memory, used and total; on a CPU that of this process, and its limit.",
            ["device", "kind"],
            registry=r,
        )

        @lru_cache(64)
        def of_steps(model: str) -> tuple[Histogram, Histogram, Histogram, Counter, Counter]:
            one = (self.step_seconds, self.batch_size, self.batch_utilization, self.image_steps, self.nfe)
            return tuple(metric.labels(model) for metric in one)  # type: ignore[return-value]

        self._of_steps = of_steps

    def count_step(self, model: str, images: int, rows: int, budget: int, seconds: float) -> None:
        """A step of so many images in `rows` network rows, of which there could have been `budget`."""
        duration, batch_size, utilization, image_steps, nfe = self._of_steps(model)
        duration.observe(seconds)
        batch_size.observe(rows)
        utilization.observe(rows / budget)
        image_steps.inc(images)
        nfe.inc(rows)

    def init_labels(self, model: str) -> None:
        """Makes the series of a checkpoint that will be served: a rate needs the 0 before the first event."""
        for counter in (self.image_steps, self.nfe, self.images, self.failed_steps):
            counter.labels(model)
        for histogram in (
            self.step_seconds,
            self.batch_size,
            self.batch_utilization,
            self.queue_seconds,
            self.cancellation_latency,
        ):
            histogram.labels(model)


class Metrics:
    """What the server does, and the registry of everything. `model` is empty where a request names none."""

    def __init__(self) -> None:
        # Without it each counter has a second series, of when it was made, which nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)  # memory, descriptors, CPU time, start: names without our prefix, as everywhere
        self.engine = EngineMetrics(r)
        self.requests = Counter(
            "ddpm_requests_total",
            "Requests by endpoint, model and outcome (ok or an error code).",
            ["endpoint", "model", "outcome"],
            registry=r,
        )
        self.key_requests = Counter(
            "ddpm_key_requests_total",
            "Requests by API key name and outcome; absent without API keys.",
            ["key", "outcome"],
            registry=r,
        )
        self.request_latency = Histogram(
            "ddpm_e2e_request_latency_seconds",
            "Time from a request's arrival to its last byte.",
            ["endpoint", "model", "outcome"],
            buckets=SECONDS,
            registry=r,
        )
        self.time_to_first_frame = Histogram(
            "ddpm_time_to_first_frame_seconds",
            "Time from the admission of a stream to its first frame.",
            ["model"],
            buckets=SECONDS,
            registry=r,
        )
        self.encode_seconds = Histogram(
            "ddpm_encode_seconds", "Time to encode a response.", buckets=SECONDS, registry=r
        )
        self.frames_sent = Counter(
            "ddpm_frames_sent_total", "Frames of denoising sequences sent.", ["model"], registry=r
        )
        self.frames_dropped = Counter(
            "ddpm_frames_dropped_total",
            "Frames dropped because the client read too slowly.",
            ["model"],
            registry=r,
        )
        self.event_loop_lag = Histogram(
            "ddpm_event_loop_lag_seconds",
            "Lag of the event loop, measured 40 times a second.",
            buckets=LAG_SECONDS,
            registry=r,
        )
        self.event_loop_max_lag = Gauge(
            "ddpm_event_loop_max_lag_seconds", "Maximum lag of the event loop in the last minute.", registry=r
        )
        self.pending_nfe_limit = Gauge(
            "ddpm_pending_nfe_limit", "Maximum amount of pending work, in network rows (NFE).", registry=r
        )
        self.model_loads = Counter(
            "ddpm_model_loads_total",
            "Attempts to load a checkpoint while serving, by outcome: loaded, unchanged, or an error code.",
            ["model", "outcome"],
            registry=r,
        )
        self.model_info = Gauge(
            "ddpm_model_info",
            "1 for each served checkpoint.",
            ["model", "sha256", "device", "runtime", "precision"],
            registry=r,
        )
        self.build_info = Gauge(
            "ddpm_build_info", "1, with the running versions.", ["version", "python", "torch"], registry=r
        )

        @lru_cache(1024)
        def of_requests(labels: tuple[str, ...]) -> tuple[Counter, Histogram]:
            return self.requests.labels(*labels), self.request_latency.labels(*labels)

        self._of_requests = of_requests

    def bind_engine(self, status: Callable[[], EngineStatus]) -> None:
        """Lets every scrape ask the engine."""
        self.registry.register(EngineCollector(status))

    def init_labels(self, model: str, sha256: str, device: str, runtime: str, precision: str) -> None:
        """Makes the series of a checkpoint that will be served."""
        self.model_info.labels(model, sha256, device, runtime, precision).set(1)
        for outcome in ("loaded", "unchanged", "invalid_checkpoint", "load_failed", "out_of_memory"):
            self.model_loads.labels(model, outcome)
        for labelled in (self.frames_sent, self.frames_dropped, self.time_to_first_frame):
            labelled.labels(model)

    def count_request(self, *labels: str, seconds: float) -> None:
        """One that has its answer after `seconds`; `labels` are endpoint, model and outcome."""
        count, latency = self._of_requests(labels)
        count.inc()
        latency.observe(seconds)

    def count_frame(self, model: str, arrival_time: float, first: bool) -> None:
        """A frame that is ready to be sent, of a request that came at `arrival_time` (`time.monotonic`)."""
        if first:
            self.time_to_first_frame.labels(model).observe(time.monotonic() - arrival_time)
        self.frames_sent.labels(model).inc()

    def remove_labels(self, model: str, sha256: str, device: str, runtime: str, precision: str) -> None:
        """It is not served any more."""
        self.model_info.remove(model, sha256, device, runtime, precision)

    def declare_build(self, version: str) -> None:
        """What is running: the service's version, Python's and torch's."""
        self.build_info.labels(version, platform.python_version(), torch.__version__).set(1)
