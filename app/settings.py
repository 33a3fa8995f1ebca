"""The settings of the server: `DDPM_*` variables and flags of `python -m app`. The only reader of the environment."""

from __future__ import annotations

import difflib
import os
import re
from typing import Any, Literal

import torch
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from app.wording import in_words

PREFIX = "DDPM_"

# What Kubernetes (and Docker's old --link) puts into every container for a service whose name begins with "ddpm":
# DDPM_SERVICE_HOST, DDPM_PORT=tcp://10.0.0.1:8000, DDPM_WEB_PORT_8000_TCP_ADDR and the like.
_LINK_NAME = re.compile(r"DDPM_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


class _Environment(EnvSettingsSource):
    """The environment without service links, or DDPM_PORT=tcp://… would be taken for a wrong --port."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.env_vars = {name: value for name, value in self.env_vars.items() if not _is_link(name, value or "")}


class Settings(BaseSettings):
    """Each field is a flag (`--max-n`) and a variable (`DDPM_MAX_N`); the flag wins."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    checkpoint: str = Field(
        "mnist",
        description="name of a bundled checkpoint, a .safetensors file, a training run's folder, or ORG/NAME on the "
        "Hugging Face hub (also ORG/NAME@REVISION), each also as NAME=PATH; separate several by commas, the first is "
        "the default",
    )
    models_dir: str = Field(
        "",
        description="folder of further checkpoints (NAME.safetensors or training runs NAME) that "
        'POST /models {"name": NAME} may load; unset: none',
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 means every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 lets the system choose")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the network runs; auto uses the GPU if there is one"
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="number of network calls at once on a CPU, each on one thread, but a lone row's on up to 4; "
        "0: one per core, of a container one per core of its limit",
    )
    runtime: Literal["auto", "torch", "openvino"] = Field(
        "auto",
        description="library that runs the network; auto means torch; openvino needs a CPU and the extra openvino",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision of the network; auto uses bf16 if the device is faster in it"
    )

    max_n: int = Field(64, ge=1, le=4096, description="maximum number of images per request")
    max_steps: int = Field(1000, ge=1, le=100_000, description="maximum number of denoising steps per request")
    max_frames: int = Field(100, ge=1, le=1000, description="maximum number of frames per denoising sequence")
    max_sequence_bytes: int = Field(
        64 * 2**20,
        ge=1,
        description="maximum size of a denoising sequence in bytes of pixels: frames x n x image size",
    )
    max_enlarged_bytes: int = Field(
        32 * 2**20, ge=1, description="maximum size of a response of enlarged images in bytes of pixels: n x image size"
    )
    max_timeout_s: float = Field(300, gt=0, le=86_400, description="maximum timeout of a request, and its default")
    max_body_bytes: int = Field(65_536, ge=1, description="maximum size of a request body")
    max_upload_bytes: int = Field(8 * 2**20, ge=1, description="the same of an edit, which has images in it")
    max_pending_nfe: int = Field(
        250_000,
        ge=1,
        description="maximum amount of admitted work, in network rows (NFE): images x steps, twice that with guidance",
    )
    max_batch_size: int = Field(
        0,
        ge=0,
        le=65_536,
        description="maximum number of network rows per denoising step; 0 means that the start measures it",
    )
    micro_batch_size: int = Field(
        0,
        ge=0,
        le=65_536,
        description="maximum number of network rows per network call; it affects the last bits of images. 0 means "
        "8 on a CPU and up to 256 on a GPU",
    )
    api_keys_file: str = Field("", description="file of API keys; if it is set, requests need a key")
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="API keys as NAME:KEY, separated by commas; a variable only, because `ps` shows flags",
    )
    key_requests_per_minute: int = Field(
        0, ge=0, le=1_000_000, description="requests per minute of a key without a limit of its own; 0 means no limit"
    )
    key_concurrency: int = Field(
        0, ge=0, le=1_000_000, description="concurrent requests of a key without a limit of its own; 0 means no limit"
    )
    public_images: bool = Field(
        False, description="GET /images needs no key, and shared caches may store its responses"
    )
    signing_key_file: str = Field(
        "",
        description="file with a secret of at least 32 characters; URLs signed by `ddpm-serve sign` need no key",
    )
    signing_key: SecretStr = Field(
        SecretStr(""), description="the same secret; a variable only, because `ps` shows flags"
    )
    cors_origins: str = Field(
        "", description="origins whose pages may call this server, separated by commas (https://a.example); * means all"
    )
    trusted_proxies: str = Field(
        "",
        description="addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto to trust, by commas",
    )
    metrics_host: str = Field("127.0.0.1", description="address to listen on for --metrics-port")
    metrics_port: int = Field(
        -1,
        ge=-1,
        le=65535,
        description="port for /metrics and health checks without keys; -1 uses --port, 0 any free port",
    )
    max_connections: int = Field(
        512,
        ge=1,
        le=1_000_000,
        description="maximum number of connections; a new one beyond it closes the one that is idle longest",
    )
    max_header_bytes: int = Field(
        16_384, ge=256, le=2**20, description="maximum size of the request line and headers together"
    )
    read_timeout_s: float = Field(
        10, gt=0, le=3600, description="time limit for receiving a request's headers, and again for its body"
    )
    write_timeout_s: float = Field(
        30, gt=0, le=3600, description="time after which a client that reads nothing of its response is disconnected"
    )
    keep_alive_s: float = Field(
        75,
        gt=0,
        le=3600,
        description="time for which an idle connection stays open; set it longer than a proxy in front does, which "
        "otherwise sends requests into closed connections",
    )
    stream_heartbeat_s: float = Field(
        15,
        gt=0,
        le=3600,
        description="time after which a stream without frames sends a heartbeat, so that no proxy closes it",
    )
    drain_s: float = Field(30, ge=0, le=3600, description="time to finish admitted work after SIGTERM")
    step_timeout_s: float = Field(
        60,
        gt=0,
        le=3600,
        description="maximum duration of a denoising step; the process exits if a step takes longer",
    )
    otlp_endpoint: str = Field(
        "",
        description="OpenTelemetry collector that gets spans of requests, such as http://localhost:4318; empty: none",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum level of log lines")

    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="format of log lines; auto means text on a terminal, else JSON"
    )

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: str) -> str:
        origins = [origin.strip() for origin in value.split(",") if origin.strip()]
        for origin in origins:
            if origin != "*" and not re.fullmatch(
                r"https?://[A-Za-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?", origin
            ):
                raise ValueError("an origin is scheme://host or scheme://host:port, without a path")
        if "*" in origins and len(origins) > 1:
            raise ValueError("* is every origin already, and stands alone")
        return ",".join(origins)

    @classmethod
    def settings_customise_sources(cls, settings_cls: type[BaseSettings], *sources: Any, **named: Any) -> Any:
        """Arguments win over the environment; there are no other sources."""
        return named["init_settings"], _Environment(settings_cls)

    def torch_device(self) -> torch.device:
        """A GPU has its index, as its tensors' devices do. Raises ValueError where cuda is asked for and not there."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, but torch finds no CUDA device")
        if self.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def complaints_about(error: ValidationError, settings: type[Settings]) -> list[str]:
    """A sentence for every value that is wrong."""
    fields = settings.model_json_schema()["properties"]
    sentences = []
    for problem in error.errors():
        name = str(problem["loc"][0])
        takes = f"must be {in_words(fields[name])}"
        if own := problem.get("ctx", {}).get("error"):  # what a validator above says
            takes = str(own)
        flag = "--" + name.replace("_", "-")
        sentences.append(f"{flag} ({PREFIX}{name.upper()}): {takes}, not {problem['input']!r}")
    return sentences


def misread(complaint: str, settings: type[Settings]) -> str:
    """A sentence for a command line that argparse refuses."""
    flags = ["--" + name.replace("_", "-") for name in settings.model_fields]
    if found := re.search(r"argument (--[\w-]+): expected", complaint):
        return f"{found[1]} needs a value; --help lists the options"
    if found := re.search(r"unrecognized arguments: (.*)", complaint):
        word = found[1].split()[0].partition("=")[0]
        if renamed := RENAMED.get(word.removeprefix("--").replace("-", "_")):
            return f"{word} is called --{renamed.replace('_', '-')} now"
        nearest = difflib.get_close_matches(word, flags, n=1)
        meant = f"; did you mean {nearest[0]}?" if nearest else ";"
        return f"unknown option {word}{meant} --help lists the options"
    if found := re.search(r"ambiguous option: (\S+) could match (.*)", complaint):
        return f"{found[1]} may be {found[2]}"
    return f"the options are not understood; --help lists them ({complaint.partition(': ')[2]})"


def _is_link(name: str, value: str) -> bool:
    name = name.upper()
    is_port = name.startswith(PREFIX) and name.endswith("PORT") and _LINK_VALUE.fullmatch(value)
    return bool(is_port or _LINK_NAME.fullmatch(name))


def service_links() -> list[str]:
    """Names of the DDPM_* variables that an orchestrator made up, which are ignored."""
    return sorted(name for name, value in os.environ.items() if _is_link(name, value))


def default_variables(defaults: dict[str, str]) -> dict[str, str]:
    """Sets those that are not set, for a library that is told in no other way. Returns what holds."""
    return {name: os.environ.setdefault(name, value) for name, value in defaults.items()}


RENAMED = {  # settings that had another name
    "max_batch_rows": "max_batch_size",
    "max_queue_rows": "max_pending_nfe",
    "chunk_rows": "micro_batch_size",
}


def unknown_variables(settings: type[Settings] = Settings) -> list[str]:
    """A sentence for every DDPM_* variable that no setting reads: most likely a misspelling."""
    known = [name.upper() for name in settings.model_fields]
    sentences = []
    for name in sorted(os.environ):
        key = name.upper().removeprefix(PREFIX)
        if name.upper().startswith(PREFIX) and key not in known and not _is_link(name, os.environ[name]):
            if renamed := RENAMED.get(key.lower()):
                sentences.append(f"{name} is called {PREFIX}{renamed.upper()} now")
                continue
            nearest = difflib.get_close_matches(key, known, n=1)
            sentences.append(f"unknown variable {name}" + (f"; did you mean {PREFIX}{nearest[0]}?" if nearest else ""))
    return sentences
