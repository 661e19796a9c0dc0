"""The Hugging Face Hub: fetch files of a repository into its cache, upload a folder.

The hub's own settings apply (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN, ...). Its client reads
them on import. The import takes a second, so it is done only when the hub is needed.
"""

import contextlib
import difflib
import glob
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.system.files import UserError, shorten

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def fetch(name: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """The cached folder of a repository, with the files that `choose` picks from its list of files.

    Offline, or when the hub does not answer, the folder holds whatever was cached before. Users
    write names like paths, so every `UserError` first says that no such folder is here.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{_not_here(name)}, and not a name on the Hugging Face Hub (OWNER/NAME)")
    hub = _client()
    failure = f"{_not_here(name)}, and not fetched from the Hugging Face Hub"
    advice = f"; offline, run `hf download {name} --local-dir FOLDER` elsewhere, name that folder"
    with _explained(failure, advice):
        if hub.constants.HF_HUB_OFFLINE:
            return _cached(hub, name)
        try:
            # One request: asking for each file would wait for each time-out.
            files = [file.rfilename for file in hub.model_info(name).siblings]
        except hub.errors.HfHubHTTPError:  # the hub answered, and refused
            raise
        except Exception as error:
            with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
                found = _cached(hub, name)
                print(f"{name}: using the cached files ({shorten(error)})", file=sys.stderr)
                return found
            raise
        wanted = [glob.escape(file) for file in choose(files)]  # the client expects patterns
        return Path(hub.snapshot_download(name, allow_patterns=wanted))


def _not_here(name: str) -> str:
    """That there is no such path on this machine, and which similar one there is."""
    path = Path(name)
    there = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    suggestion = f" (did you mean {path.parent / near[0]}?)" if near else ""
    return f"{name}: no such file or folder here{suggestion}"


def _cached(hub: Any, name: str) -> Path:
    """The cached folder of a repository, with whatever files it has."""
    # A pattern that matches no file: the client treats matching files that are absent as missing.
    return Path(hub.snapshot_download(name, local_files_only=True, allow_patterns=["*/"]))


def check_push(name: str) -> None:
    """UserError if an upload to this repository is bound to fail, as far as can be told offline."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name}: not a name on the Hugging Face Hub, such as owner/digits")
    hub = _client()
    if hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"{name}: cannot upload while HF_HUB_OFFLINE is set")
    if hub.get_token() is None:
        raise UserError(
            f"{name}: no token for the hub; run `hf auth login`, or set HF_TOKEN to a token with "
            "write access"
        )


def push(folder: Path, name: str, is_private: bool) -> str:
    """Upload a folder in one commit, creating the repository if needed; returns its address.

    UserError, before anything is uploaded, if it should be private and is public.
    """
    hub = _client()
    with _explained(f"{name}: not uploaded"):
        url = hub.create_repo(name, private=is_private, exist_ok=True)
        if is_private and not hub.model_info(name).private:
            raise UserError(
                f"{name}: this repository exists and is public; make it private on its page, or "
                "leave out --private"
            )
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Upload {folder.name}",
            ignore_patterns=[".*"],
        )
    return str(url)


def _client() -> Any:
    """The hub's client; it shows progress bars on a terminal only."""
    import huggingface_hub as hub

    hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    return hub


@contextlib.contextmanager
def _explained(failure: str, advice: str = "") -> Iterator[None]:
    """A block in which the many exceptions of the hub's client become a one-line UserError."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, errors.GatedRepoError):
            reason = "its page has to grant you access; then run `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "no such repository, or a private one: run `hf auth login` or set HF_TOKEN"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = "nothing is cached, and HF_HUB_OFFLINE is set or the hub does not answer"
        else:
            reason = shorten(error)
            response = getattr(error, "response", None)
            if response is not None and response.status_code in (401, 403):
                reason += "; the token may lack permission"
        raise UserError(f"{failure}: {reason}{advice}") from error
