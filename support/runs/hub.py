"""Models on the Hugging Face Hub: one's files into the hub's cache, a folder into a repository.

The hub's own settings hold (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN, ...). Its client reads
them when it is imported, which takes a second and is done only where it is needed.
"""

import contextlib
import glob
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.system.files import UserError, shorten

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def fetch(name: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """The folder of a repository in the hub's cache, with the files that `choose` takes of all.

    Where the hub is not to be asked, or cannot be, it is what the cache has of the repository.
    """
    hub = _client(name)
    with _explained(name, "not on this machine, and not fetched"):
        if hub.constants.HF_HUB_OFFLINE:
            return _cached(hub, name)
        try:
            # One question, not asked again for half a minute where nobody answers.
            files = [file.rfilename for file in hub.model_info(name).siblings]
        except hub.errors.HfHubHTTPError:  # it has been asked, and says no
            raise
        except Exception as error:
            with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
                found = _cached(hub, name)
                print(f"{name}: as fetched before ({shorten(error)})", file=sys.stderr)
                return found
            raise
        # Escaped, as the client takes patterns.
        wanted = [glob.escape(file) for file in choose(files)]
        return Path(hub.snapshot_download(name, allow_patterns=wanted))


def _cached(hub: Any, name: str) -> Path:
    """The folder of a repository in the cache, whatever it has."""
    # A pattern that fits no file: the client counts as missing what fits and is not there.
    return Path(hub.snapshot_download(name, local_files_only=True, allow_patterns=["*/"]))


def check_push(name: str) -> None:
    """UserError where nothing can be uploaded to a repository, as far as this machine can tell."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name}: not a name on the Hugging Face Hub, such as owner/digits")
    hub = _client(name)
    if hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"{name}: HF_HUB_OFFLINE is set, so nothing can be uploaded")
    if hub.get_token() is None:
        raise UserError(
            f"{name}: no token for the hub; run `hf auth login`, or set HF_TOKEN to one that may "
            "write"
        )


def push(folder: Path, name: str, is_private: bool) -> str:
    """Upload a folder's files in one commit; gives the repository's address.

    The repository is made if need be. UserError where one that should be private is not: then
    nothing is uploaded.
    """
    hub = _client(name)
    with _explained(name, "not uploaded"):
        url = hub.create_repo(name, private=is_private, exist_ok=True)
        if is_private and not hub.model_info(name).private:
            raise UserError(
                f"{name}: is there already, and public; make it private on its page, or leave out "
                "--private"
            )
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Upload {folder.name}",
            ignore_patterns=[".*"],
        )
    return str(url)


def _client(name: str) -> Any:
    """The hub's client, silent but for a bar where somebody looks."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(f"{name}: {shorten(error)}; pip install huggingface_hub") from error
    hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    return hub


@contextlib.contextmanager
def _explained(name: str, failure: str) -> Iterator[None]:
    """A block in which what the hub's client raises, of many kinds, becomes one line."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name}: its owner has to let you in: ask on its page on the hub, and run "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no such repository on the hub, or a private one, which needs `hf auth login` "
            "or HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: {failure}: nothing of it is in the hub's cache, and the hub is not to be "
            f"asked (HF_HUB_OFFLINE) or cannot be; where it can, run `hf download {name} "
            "--local-dir FOLDER`, bring that folder here and name it"
        ) from error
    except Exception as error:
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        refused = "; the token may not do that" if status in (401, 403) else ""
        raise UserError(f"{name}: {failure} ({shorten(error)}){refused}") from error
