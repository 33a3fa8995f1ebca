"""The Hugging Face hub: what a repository has, and those of its files that are asked for. Nothing of it is run.

Its library is needed only when a name is looked up: `pip install huggingface_hub`, or the extra `hub`. Token, endpoint,
cache and offline mode are the library's: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")  # no repository's name ends like this
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_S = 10.0  # for the hub's first answer


class HubError(ValueError):
    """The hub does not give it; the message says why."""


class HubUnreachableError(HubError):
    """The hub does not answer, or must not be asked, as `why` says: what was fetched before may do."""

    def __init__(self, name: HubName, why: str) -> None:
        super().__init__(f"there is no file or folder {name} here, it was not fetched before, and {why}")
        self.why = why


@dataclass(frozen=True)
class HubName:
    """ORG/NAME, or ORG/NAME@REVISION: a branch, a tag or a commit."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which stays what it is."""
        return COMMIT.fullmatch(self.revision or "") is not None


@dataclass(frozen=True)
class Repository:
    """A repository's files at one commit, with their sizes in bytes where the hub tells them."""

    name: HubName
    commit: str
    files: Mapping[str, int | None]
    library: str | None = None  # of the models in it, as the hub says
    tags: frozenset[str] = frozenset()
    folder: Path | None = field(default=None, compare=False)  # where all that is there is, when the hub is not


def parse(text: str) -> HubName | None:
    """The name of a repository, as far as it looks like one: a path may look the same."""
    match = NAME.fullmatch(text)
    if match is None or match[1].endswith(FILES) or ".." in text:
        return None
    return HubName(match[1], match[2])


def look(name: HubName) -> Repository:
    """What the hub has under that name, or, where it cannot be asked, what the library fetched before.

    Raises HubError, HubUnreachableError where neither is there.
    """
    try:
        with _in_words(name):
            from huggingface_hub import HfApi

            info = HfApi().model_info(name.repo, revision=name.revision, timeout=TIMEOUT_S, files_metadata=True)
            files = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
            return Repository(name, str(info.sha), files, info.library_name, frozenset(info.tags or ()))
    except HubUnreachableError:
        if found := _fetched_before(name):
            return found
        raise


def _fetched_before(name: HubName) -> Repository | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True))
    except Exception:  # the library's, of which there are many
        return None
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Repository(name, folder.name, files, folder=folder)


def fetch(repository: Repository, files: Iterable[str]) -> Path:
    """The folder with these files of it, in the library's cache. Raises HubError."""
    folder = repository.folder
    with _in_words(repository.name):
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        for file in files:
            if repository.folder is not None and file in repository.files:
                continue
            got = Path(HfApi().hf_hub_download(repository.name.repo, file, revision=repository.commit))
            folder = got.parents[file.count("/")]
    if folder is None:
        raise HubError(f"nothing of {repository.name} was asked for")
    return folder


@contextmanager
def _in_words(name: HubName) -> Iterator[None]:
    """Raises HubError with a sentence for whatever the library raises."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise HubError(
            f"there is no file or folder {name} here; to look for it on the Hugging Face hub, install huggingface_hub"
        ) from None
    repo = name.repo
    absent = f"there is no file or folder {name} here"
    for library in ("httpx", "httpx2"):  # each request would be a line in a server's log
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: accept its terms on its page on the hub, and set HF_TOKEN to your token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{absent}, and no such repository on the Hugging Face hub, unless it is private: then set HF_TOKEN to "
            "your token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {name.revision or 'main'}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubUnreachableError(name, "HF_HUB_OFFLINE is set") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubUnreachableError(name, "the Hugging Face hub cannot be reached") from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{name} has not all of the files that it lists") from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo} is no name that the hub can have") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(f"the hub does not accept your token for {repo} (status {status}): see HF_TOKEN") from error
        if status >= 500 or status == 429:
            raise HubUnreachableError(name, f"the hub answers with status {status}") from error
        raise HubError(f"{absent}, and the hub answers with status {status}") from error
    except HubError:
        raise
    except PermissionError as error:
        raise HubError(
            f"{error.filename or 'the cache'} cannot be written: set HF_HOME to a folder of yours"
        ) from error
    except Exception as error:  # of whatever library carries its requests; a full disk
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise HubError(f"{error.filename}: {error.strerror}") from error
        why = type(error).__name__
        raise HubUnreachableError(name, f"the Hugging Face hub cannot be reached ({why})") from error
