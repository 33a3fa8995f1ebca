"""The checkpoints that are served, by name, and how others come into their place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from app import checkpoints
from app.checkpoints import BEST, MODEL_NAME, Source
from app.engine.engine import Engine
from app.engine.instance import ModelInstance
from app.engine.memory import is_out_of_memory
from app.errors import InvalidCheckpoint, LoadFailed, ModelConflict, ModelNotFound, OutOfMemory, ServiceError
from app.metrics import Metrics
from app.settings import Settings
from model.checkpoint import Checkpoint, CheckpointError

log = logging.getLogger("ddpm.models")


class ModelRegistry:
    """Used on the event loop only. A new checkpoint is read and packed by a thread for that, is warmed up by the
    engine between its steps, and then takes the old one's place in one assignment: requests that are there end on the
    old one, which leaves with the last of them. One is loaded at a time.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, engine: Engine, make: Callable[[Checkpoint], ModelInstance]
    ):
        """Raises CheckpointError or ValueError where the settings' checkpoints or their folder cannot be served."""
        self._metrics, self._engine, self._make = metrics, engine, make
        self._folder = Path(settings.models_dir).resolve() if settings.models_dir else None
        if self._folder is not None and not self._folder.is_dir():
            raise ValueError(f"models_dir is {settings.models_dir}, which is not a folder")
        self._served: dict[str, ModelInstance] = {}
        self._files: dict[str, Path] = {}
        self.loading: str | None = None  # its name
        self._reload_requested = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        # OpenMP keeps a team for every thread that used it, which would hinder the engine's: see `create_app`. This
        # sets the thread's own number, and that of threads to come; the engine's stays as it is.
        self._loader = ThreadPoolExecutor(1, "loader", initializer=torch.set_num_threads, initargs=(1,))
        for source in checkpoints.parse(settings.checkpoint):
            self._files[source.name] = source.path
        for name, path in self._files.items():
            self._served[name] = served = make(checkpoints.load(Source(name, path)))
            engine.load_model(served)
            self._declare(served)

    def __iter__(self) -> Iterator[ModelInstance]:
        return iter(self._served.values())

    @property
    def default(self) -> ModelInstance:
        """What requests get that name none."""
        return next(iter(self))

    def find(self, name: str | None) -> ModelInstance:
        """What a new request gets. Raises ModelNotFound."""
        if name is None:
            return self.default
        if name not in self._served:
            raise ModelNotFound(f"no model {name!r:.80}; there are {', '.join(self._served)}", param="model")
        return self._served[name]

    async def load(self, name: str) -> tuple[ModelInstance, str | None]:
        """What is served under the name from now on, and the SHA-256 of what was before. Raises ModelNotFound,
        ModelConflict, InvalidCheckpoint, LoadFailed, OutOfMemory or NotReady; then nothing has changed."""
        path = self._file(name)
        if self.loading is not None:
            raise ModelConflict(f"{self.loading} is being loaded; try again when it is done", retry_after=5)
        async with self._one_at_a_time:
            return await self._load(name, path)

    async def reload(self) -> None:
        """Looks at the file of everything that is served. Where it has changed it is loaded; where it cannot be, that
        is logged, and what is served stays."""
        for name in list(self._served):
            async with self._one_at_a_time:
                if name in self._served:
                    with suppress(ServiceError):
                        await self._load(name, self._file(name))

    def request_reload(self) -> None:
        """`watch` reloads soon. For a signal handler."""
        self._reload_requested.set()

    async def watch(self) -> None:
        """Reloads whenever it is requested."""
        while True:
            await self._reload_requested.wait()
            self._reload_requested.clear()
            try:
                await self.reload()
            except Exception:
                log.exception("models not reloaded")

    def remove(self, name: str) -> None:
        """Raises ModelNotFound, or ModelConflict for the default and for one that is being loaded."""
        served = self.find(name)
        if served is self.default:
            raise ModelConflict(f"{name} is the default: requests that name no model need it")
        if self.loading == name:
            raise ModelConflict(f"{name} is being loaded; try again when it is done", retry_after=5)
        del self._served[name]
        self._unload(served)
        log.info("model removed", extra={"model": name, "sha256": served.sha256})

    def close(self) -> None:
        """Loads nothing more."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def _load(self, name: str, path: Path) -> tuple[ModelInstance, str | None]:
        old = self._served.get(name)
        known = None if old is None else old.sha256
        self.loading, outcome = name, "internal_error"
        try:
            new = await asyncio.get_running_loop().run_in_executor(self._loader, self._read, name, path, known)
            if new is not None:
                await asyncio.wrap_future(self._engine.load_model(new))
            outcome = "unchanged" if new is None else "loaded"
        except ServiceError as error:
            outcome = error.code
            log.error("model %s not loaded, nothing changes: %s", name, error)
            raise
        finally:
            self.loading = None
            self._metrics.model_loads.labels(name, outcome).inc()
        log.info("model %s", outcome, extra={"model": name, "sha256": new.sha256 if new else known, "replaced": known})
        if new is None:
            assert old is not None
            return old, known
        self._served[name] = new  # an old one keeps its place, and so the default stays the default
        if old is not None:
            self._unload(old)
        self._declare(new)
        return new, known

    def _read(self, name: str, path: Path, known: str | None) -> ModelInstance | None:
        """On the loader's thread. None where the file is the one that is served."""
        try:
            loaded = checkpoints.load(Source(name, path))
            return None if loaded.sha256 == known else self._make(loaded)
        except CheckpointError as error:
            raise InvalidCheckpoint(str(error).replace(str(path), name)) from None  # paths are nobody's business
        except Exception as error:
            log.error("model %s not loaded", name, exc_info=error)
            if is_out_of_memory(error):
                raise OutOfMemory(f"there is not enough memory to load {name}") from None
            raise LoadFailed(f"{name} cannot be loaded") from None

    def _file(self, name: str) -> Path:
        """Where a checkpoint comes from: the settings say so, or it lies in the folder, and nowhere else. Raises
        ModelNotFound."""
        if name in self._files:
            return self._files[name]
        path = self._in_folder(name)
        if path is None or not (path.is_file() or name in self._served):  # that one is gone, loading it will say
            raise ModelNotFound(f"no model {name!r:.80}; there are {', '.join(self._names())}", param="name")
        return path

    def _in_folder(self, name: str) -> Path | None:
        if self._folder is None or not MODEL_NAME.fullmatch(name):
            return None
        path = self._folder / f"{name}.safetensors"
        if not path.is_file() and (self._folder / name / BEST).is_file():  # a training run
            path = self._folder / name / BEST
        return path if path.resolve().is_relative_to(self._folder) else None  # and not by a link that leads elsewhere

    def _names(self) -> list[str]:
        """What may be loaded."""
        files = self._folder.glob("*.safetensors") if self._folder else ()
        runs = self._folder.glob(f"*/{BEST}") if self._folder else ()
        names = {path.stem for path in files if path.is_file()} | {path.parent.name for path in runs}
        found = {name for name in names if self._in_folder(name)}
        return sorted(found | set(self._files) | set(self._served))

    def _declare(self, served: ModelInstance) -> None:
        self._metrics.engine.init_labels(served.name)
        self._metrics.init_labels(served.name, served.sha256, **served.runs_on)

    def _unload(self, served: ModelInstance) -> None:
        self._metrics.remove_labels(served.name, served.sha256, **served.runs_on)
        self._engine.unload_model(served)
