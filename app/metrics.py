"""Every Prometheus instrument, declared once. Base units, `_total` on counters, bounded labels."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Protocol

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PAUSE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RATIO = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


class Watched(Protocol):
    """What a scrape asks of the engine."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""

    @property
    def stalled(self) -> bool:
        """Whether the present step takes far longer than expected."""

    @property
    def step_age(self) -> float:
        """Seconds since the present step began; 0 between steps."""

    @property
    def oldest_wait(self) -> float:
        """Seconds for which the oldest request has waited for its first step."""

    @property
    def pending_rows(self) -> int:
        """U-Net rows still to be run."""

    @property
    def rows_per_second(self) -> float:
        """Measured speed of the device."""


class EngineMetrics:
    """What the engine thread does. The label `model` is the checkpoint's name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r, model = registry, ["model"]
        self.rows_running = Gauge("ddpm_rows_running", "Images in the batch of the present step.", model, registry=r)
        self.rows_waiting = Gauge(
            "ddpm_rows_waiting", "Admitted images outside the batch of the present step.", model, registry=r
        )
        self.batch_rows_limit = Gauge("ddpm_batch_rows_limit", "Most U-Net rows in a step.", model, registry=r)
        self.step_seconds = Histogram(
            "ddpm_step_seconds", "Duration of a denoising step of one batch.", model, buckets=STEP_SECONDS, registry=r
        )
        self.batch_rows = Histogram("ddpm_batch_rows", "U-Net rows in a step's batch.", model, buckets=ROWS, registry=r)
        self.batch_fill = Histogram(
            "ddpm_batch_fill_ratio", "A batch's U-Net rows over its room for them.", model, buckets=RATIO, registry=r
        )
        self.queue_seconds = Histogram(
            "ddpm_queue_seconds", "From admission to the first step of a request.", model, buckets=SECONDS, registry=r
        )
        self.cancel_seconds = Histogram(
            "ddpm_cancel_seconds",
            "From a client's leaving to the freeing of its places.",
            model,
            buckets=STEP_SECONDS,
            registry=r,
        )
        self.image_steps = Counter("ddpm_image_steps_total", "Denoising steps, counted per image.", model, registry=r)
        self.images = Counter(
            "ddpm_images_total", "Images finished in requests that were answered with images.", model, registry=r
        )
        self.wasted_steps = Counter(
            "ddpm_wasted_image_steps_total",
            "Image-steps of requests that ended without images, by what ended them.",
            ["model", "outcome"],
            registry=r,
        )
        self.failed_steps = Counter("ddpm_failed_steps_total", "Steps that raised an exception.", model, registry=r)
        self.restarts = Counter("ddpm_engine_restarts_total", "Times the engine failed outside a step.", registry=r)
        self.memory_bytes = Gauge(
            "ddpm_device_memory_bytes",
            "Memory of the device, used and in all. On a CPU: of this process, and what it may have.",
            ["device", "kind"],
            registry=r,
        )

    def declare(self, model: str, max_rows: Callable[[], int]) -> None:
        """Makes the series of a checkpoint that will be served: a rate needs the 0 before the first event."""
        self.batch_rows_limit.labels(model).set_function(max_rows)
        for gauge in (self.rows_running, self.rows_waiting):
            gauge.labels(model)
        for counter in (self.image_steps, self.images, self.failed_steps):
            counter.labels(model)
        for histogram in (self.step_seconds, self.batch_rows, self.batch_fill, self.queue_seconds, self.cancel_seconds):
            histogram.labels(model)

    def forget(self, model: str) -> None:
        """No checkpoint of that name is there any more: it has no queue. What it did stays counted."""
        for gauge in (self.rows_running, self.rows_waiting, self.batch_rows_limit):
            gauge.remove(model)


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
            "Requests by endpoint, model, and outcome: ok or an error's code.",
            ["endpoint", "model", "outcome"],
            registry=r,
        )
        self.key_requests = Counter(
            "ddpm_key_requests_total",
            "Requests by the name of their API key and by outcome; none where no keys are configured.",
            ["key", "outcome"],
            registry=r,
        )
        self.request_seconds = Histogram(
            "ddpm_request_seconds",
            "From a request's arrival to its last byte.",
            ["endpoint", "model", "outcome"],
            buckets=SECONDS,
            registry=r,
        )
        self.first_frame_seconds = Histogram(
            "ddpm_first_frame_seconds",
            "From admission to the first frame of a stream, ready to be sent.",
            ["model"],
            buckets=SECONDS,
            registry=r,
        )
        self.encode_seconds = Histogram("ddpm_encode_seconds", "Making a picture file.", buckets=SECONDS, registry=r)
        self.frames_sent = Counter(
            "ddpm_frames_sent_total", "Frames of denoising sequences sent.", ["model"], registry=r
        )
        self.frames_dropped = Counter(
            "ddpm_frames_dropped_total",
            "Frames dropped because a newer one came before the client took them.",
            ["model"],
            registry=r,
        )
        self.event_loop_pauses = Histogram(
            "ddpm_event_loop_pause_seconds",
            "How long the event loop was busy with something else, looked at a hundred times a second.",
            buckets=PAUSE_SECONDS,
            registry=r,
        )
        self.event_loop_longest_pause = Gauge(
            "ddpm_event_loop_longest_pause_seconds",
            "The longest pause of the event loop in the last minute.",
            registry=r,
        )
        # Asked of the engine at every scrape; see `create_app`.
        self.ready = Gauge("ddpm_ready", "1 when /readyz says yes.", registry=r)
        self.stalled = Gauge("ddpm_engine_stalled", "1 while a step takes far longer than expected.", registry=r)
        self.heartbeat_age = Gauge(
            "ddpm_heartbeat_age_seconds", "How long the present step has been running; 0 between steps.", registry=r
        )
        self.oldest_wait = Gauge(
            "ddpm_oldest_wait_seconds", "How long the oldest request without a step has waited; 0: none.", registry=r
        )
        self.pending_rows = Gauge(
            "ddpm_pending_work_rows",
            "Work admitted and not done, in U-Net rows: images x steps, twice that with guidance.",
            registry=r,
        )
        self.pending_rows_limit = Gauge("ddpm_pending_work_rows_limit", "Most work admitted at once.", registry=r)
        self.rows_per_second = Gauge(
            "ddpm_expected_rows_per_second", "U-Net rows a second, as admission expects of full batches.", registry=r
        )
        self.model_loads = Counter(
            "ddpm_model_loads_total",
            "Attempts to load a checkpoint anew while serving: loaded, unchanged, or an error's code.",
            ["model", "outcome"],
            registry=r,
        )
        self.model_info = Gauge(
            "ddpm_model_info",
            "1 for a checkpoint that is served.",
            ["model", "sha256", "device", "runtime", "precision"],
            registry=r,
        )
        self.build_info = Gauge(
            "ddpm_build_info", "1, with the versions that run.", ["version", "python", "torch"], registry=r
        )

    def ask(self, engine: Watched) -> None:
        """Lets every scrape ask the engine."""
        self.ready.set_function(lambda: engine.ready)
        self.stalled.set_function(lambda: engine.stalled)
        self.heartbeat_age.set_function(lambda: engine.step_age)
        self.oldest_wait.set_function(lambda: engine.oldest_wait)
        self.pending_rows.set_function(lambda: engine.pending_rows)
        self.rows_per_second.set_function(lambda: engine.rows_per_second)

    def declare(self, model: str, sha256: str, device: str, runtime: str, precision: str) -> None:
        """Makes the series of a checkpoint that will be served."""
        self.model_info.labels(model, sha256, device, runtime, precision).set(1)
        for outcome in ("loaded", "unchanged", "invalid_checkpoint", "load_failed", "out_of_memory"):
            self.model_loads.labels(model, outcome)
        for labelled in (self.frames_sent, self.frames_dropped, self.first_frame_seconds):
            labelled.labels(model)

    def forget(self, model: str, sha256: str, device: str, runtime: str, precision: str) -> None:
        """New requests get it no more."""
        self.model_info.remove(model, sha256, device, runtime, precision)

    def declare_build(self, version: str) -> None:
        """What is running: the service's version, Python's and torch's."""
        self.build_info.labels(version, platform.python_version(), torch.__version__).set(1)
