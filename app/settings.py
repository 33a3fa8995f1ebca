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
        description="a bundled checkpoint's name, a .safetensors file, the folder of a training run, or ORG/NAME (also "
        "@REVISION) on the Hugging Face hub, each also as NAME=PATH; several by commas, the first is the default",
    )
    models_dir: str = Field(
        "",
        description="folder whose NAME.safetensors, or training runs NAME, may be loaded by POST /models "
        '{"name": NAME}; unset: none',
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 lets the system choose")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is the GPU where there is one")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the network; 0 is one per core")
    runtime: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="what runs the network; auto is torch, openvino needs the extra of that name and a CPU"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the network's products; auto is bf16 where the device has matrix units for it"
    )

    max_n: int = Field(64, ge=1, le=4096, description="most images in a request")
    max_steps: int = Field(1000, ge=1, le=100_000, description="most denoising steps in a request")
    max_frames: int = Field(100, ge=1, le=1000, description="most frames in a denoising sequence")
    max_sequence_bytes: int = Field(
        64 * 2**20,
        ge=1,
        description="most bytes of pixels in a denoising sequence: frames x n x size of an image",
    )
    max_timeout_s: float = Field(300, gt=0, le=86_400, description="longest time a request may take, and the default")
    max_body_bytes: int = Field(65_536, ge=1, description="largest request body")
    max_pending_nfe: int = Field(
        250_000,
        ge=1,
        description="most work admitted at once, in U-Net rows: images x steps, twice that with guidance",
    )
    max_batch_size: int = Field(
        0,
        ge=0,
        le=65_536,
        description="most U-Net rows in a step; 0 is as many as the warm-up finds to be worth it, and for a crowd as "
        "many as gain anything",
    )
    micro_batch_size: int = Field(
        0,
        ge=0,
        le=65_536,
        description="most U-Net rows in a network call (it decides an image's last bits); 0 is 32 on a "
        "CPU, 8 there from 10 million parameters on, up to 256 on a GPU",
    )
    api_keys_file: str = Field("", description="file of API keys (see app/auth.py); with one, requests need a key")
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="API keys as NAME:KEY, by commas; as a variable only, since `ps` shows everybody the flags",
    )
    key_requests_per_minute: int = Field(
        0, ge=0, le=1_000_000, description="requests a minute of a key that the file gives no other limit; 0 for any"
    )
    key_concurrency: int = Field(
        0, ge=0, le=1_000_000, description="requests under way of a key that the file gives no other limit; 0 for any"
    )
    cors_origins: str = Field(
        "", description="origins whose pages may use this server, by commas (https://a.example), or * for all"
    )
    trusted_proxies: str = Field(
        "", description="addresses or networks, by commas, whose X-Forwarded-For and X-Forwarded-Proto are believed"
    )
    metrics_host: str = Field("127.0.0.1", description="address of --metrics-port")
    metrics_port: int = Field(
        -1,
        ge=-1,
        le=65535,
        description="port for /metrics and the health checks, without keys; -1: /metrics is on --port, 0: any free one",
    )
    max_connections: int = Field(
        512, ge=1, le=1_000_000, description="most connections; beyond them the longest idle one makes room"
    )
    max_header_bytes: int = Field(16_384, ge=256, le=2**20, description="largest request line and headers")
    read_timeout_s: float = Field(
        10, gt=0, le=3600, description="time in which a request's headers must arrive, and again its body"
    )
    write_timeout_s: float = Field(
        30, gt=0, le=3600, description="time after which a client that takes nothing of an answer is cut off"
    )
    keep_alive_s: float = Field(
        75,
        gt=0,
        le=3600,
        description="time for which a connection is kept for the next request; longer than a proxy in front keeps it, "
        "or it sends a request into a closed one",
    )
    stream_heartbeat_s: float = Field(
        15,
        gt=0,
        le=3600,
        description="time after which a stream without news sends a line that means nothing, so that no proxy cuts it",
    )
    drain_s: float = Field(30, ge=0, le=3600, description="time to finish admitted work after SIGTERM")
    step_timeout_s: float = Field(
        60,
        gt=0,
        le=3600,
        description="a denoising step that takes longer, and twice what makes the server not ready, ends the process",
    )
    otlp_endpoint: str = Field(
        "", description="OpenTelemetry collector for spans of requests, such as http://localhost:4318; empty: none"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="of the log lines; auto is text at a terminal, else JSON"
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
