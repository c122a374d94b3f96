"""A quick check that the Hugging Face hub has a model, before any long work with it.

    check_hub_model("Qwen/Qwen3-0.6B")      # raises LimbeckError if there is no such model

huggingface_hub retries each file of a model with doubling pauses, so that a mistyped name on a machine without network
takes a minute to fail. One request without a retry fails in seconds. If the hub does not answer but its local cache has
the model, the cache is used.
"""

import difflib
import shlex
from pathlib import Path

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError

TIMEOUT = 5  # seconds
_cached_only: dict[str, bool] = {}  # earlier results in this process


def split_revision(name: str) -> tuple[str, str | None]:
    """Split "owner/name@v1.0" into ("owner/name", "v1.0"): a branch, tag or commit; a folder's path is not split.

    Raises:
        LimbeckError: one of the two sides of the @ is empty.
    """
    if "@" not in name or Path(name).expanduser().exists():
        return name, None
    repository, _, revision = name.partition("@")
    if not repository or not revision:
        raise LimbeckError(f"'{name}' is not a model with a revision", expected="owner/name, or owner/name@revision")
    return repository, revision


def check_hub_model(name: str) -> bool:
    """Return True if the hub cannot be reached and its local cache has the model, which then has to be loaded offline.

    Any other problem (no access, a slow or failing hub) is left to the loading itself, whose errors say more about it.

    Raises:
        LimbeckError: the name cannot be a repository, the hub has no such model or revision, or the hub cannot be
            reached and its local cache does not have the model.
    """
    # start-up time: commands that only split a name do not need the hub's client
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if name in _cached_only:
        return _cached_only[name]
    if constants.HF_HUB_OFFLINE:
        return False
    full_name, (name, revision) = name, split_revision(name)
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
    except GatedRepoError:
        return False
    except RevisionNotFoundError as error:
        raise LimbeckError(
            f"'{name}' has no revision '{revision}' on the hub",
            expected="a branch, a tag or a full commit hash of that model",
            hint=f"{name}   (the newest revision)",
        ) from error
    except RepositoryNotFoundError as error:
        if cached:  # a private model, and the login has expired
            return False
        raise LimbeckError(
            f"the hub has no model '{name}'",
            expected="owner/name as the hub spells it, or a folder",
            hint=find_similar_folder(name) or "check the spelling; a private model needs `hf auth login`",
        ) from error
    except HFValidationError as error:
        raise LimbeckError(f"'{name}' is neither a folder nor a name on the hub", expected="owner/name") from error
    except OfflineModeIsEnabled:
        return False
    except Exception as error:
        if not _no_connection(error):
            return False
        if cached:
            console.print(f"the hub cannot be reached; loading '{name}' from its local cache", markup=False)
            _cached_only[full_name] = True
            return True
        raise LimbeckError(
            f"there is no folder '{name}', and the hub cannot be reached to look for a model of that name",
            expected="a folder, or a network connection for names on the hub",
            hint=find_similar_folder(name),
        ) from error
    _cached_only[full_name] = False
    return False


def find_similar_folder(name: str) -> str | None:
    """Return the folder whose name is nearly that of one that is missing, beside it; None for none."""
    parent = Path(name).expanduser().parent
    if parent == Path() or not parent.is_dir():
        return None
    folders = [child.name for child in parent.iterdir() if child.is_dir()]
    closest = difflib.get_close_matches(Path(name).name, folders, n=1)
    return shlex.quote(str(parent / closest[0])) if closest else None


def _no_connection(error: BaseException) -> bool:
    """Return whether no connection could be made, by the class names of httpx's and requests' errors."""
    cause: BaseException | None = error
    while cause is not None:
        names = {cls.__name__ for cls in type(cause).__mro__}
        if names & {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}:
            return True
        cause = cause.__cause__ or cause.__context__
    return False
