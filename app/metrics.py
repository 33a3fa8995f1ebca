"""Every Prometheus instrument, declared once. Base units, `_total` on counters, bounded labels."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class EngineMetrics:
    """What the engine thread does."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r = registry
        self.rows_running = Gauge("ddpm_rows_running", "Images in the batch of the present step.", registry=r)
        self.rows_waiting = Gauge(
            "ddpm_rows_waiting", "Admitted images outside the batch of the present step.", registry=r
        )
        self.step_seconds = Histogram(
            "ddpm_step_seconds",
            "Duration of a denoising step of one batch.",
            buckets=STEP_SECONDS,
            registry=r,
        )
        self.batch_rows = Histogram("ddpm_batch_rows", "U-Net rows in a step's batch.", buckets=ROWS, registry=r)
        self.queue_seconds = Histogram(
            "ddpm_queue_seconds",
            "From admission to the first step of a request.",
            buckets=SECONDS,
            registry=r,
        )
        self.cancel_seconds = Histogram(
            "ddpm_cancel_seconds",
            "From a client's leaving to the freeing of its places.",
            buckets=STEP_SECONDS,
            registry=r,
        )
        self.image_steps = Counter("ddpm_image_steps_total", "Denoising steps, counted per image.", registry=r)
        self.images = Counter(
            "ddpm_images_total", "Images finished in requests that were answered with images.", registry=r
        )
        self.wasted_steps = Counter(
            "ddpm_wasted_image_steps_total", "Image-steps of requests that ended without images.", registry=r
        )
        self.failed_steps = Counter("ddpm_failed_steps_total", "Steps that raised an exception.", registry=r)
        self.restarts = Counter(
            "ddpm_engine_restarts_total", "Times the engine failed outside a step and went on.", registry=r
        )


class Metrics:
    """What the server does, and the registry of everything."""

    def __init__(self) -> None:
        # Without it each counter has a second series, of when it was made, which nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = r = CollectorRegistry()
        self.engine = EngineMetrics(r)
        self.requests = Counter(
            "ddpm_requests_total",
            "Requests by endpoint and by outcome: ok or an error's code.",
            ["endpoint", "outcome"],
            registry=r,
        )
        self.request_seconds = Histogram(
            "ddpm_request_seconds",
            "From a request's arrival to its last byte.",
            ["endpoint"],
            buckets=SECONDS,
            registry=r,
        )
        self.encode_seconds = Histogram("ddpm_encode_seconds", "Making a picture file.", buckets=SECONDS, registry=r)
        self.frames_sent = Counter("ddpm_frames_sent_total", "Frames of denoising sequences sent.", registry=r)
        self.frames_dropped = Counter(
            "ddpm_frames_dropped_total",
            "Frames dropped because a newer one came before the client took them.",
            registry=r,
        )
        self.ready = Gauge("ddpm_ready", "1 when /readyz says yes.", registry=r)
        self.model_info = Gauge(
            "ddpm_model_info",
            "1 for the checkpoint that is served.",
            ["model", "sha256", "device"],
            registry=r,
        )
