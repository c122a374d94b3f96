"""A short question to the Hugging Face hub before long work with it: is there a model of that name?

    check_hub_model("Qwen/Qwen3-0.6B")

huggingface_hub tries each file of a model several times, with pauses that double, so that a mistyped name on a machine
without a network takes a minute to be refused. One question without a second try tells in seconds. Where the hub does
not answer but the model is in its local cache, the cache is used and the hub is left alone.
"""

from pathlib import Path

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError

SECONDS = 5  # that the hub has for its answer
_known: dict[str, bool] = {}  # what this process was told before
LOGIN = "check the spelling; a private one needs `hf auth login`"


def split_revision(name: str) -> tuple[str, str | None]:
    """("owner/name", "v1.0") of "owner/name@v1.0": a branch, a tag or a commit; of a folder's path all of it.

    Raises:
        LimbeckError: nothing stands on one of the sides of the @.
    """
    if "@" not in name or Path(name).expanduser().exists():
        return name, None
    repository, _, revision = name.partition("@")
    if not repository or not revision:
        raise LimbeckError(f"'{name}' names no model and revision", expected="owner/name, or owner/name@revision")
    return repository, revision


def check_hub_model(name: str) -> bool:
    """Whether the hub cannot be reached and its local cache has the model: then that is all there is to load.

    Raises:
        LimbeckError: a name that cannot be a repository, that the hub does not know (or not with that revision), or
            where it cannot be reached and its local cache has nothing of that name.

    Any other trouble (no access, a slow or an ailing hub) is left to the loading itself, which knows more of it.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if name in _known:
        return _known[name]
    if constants.HF_HUB_OFFLINE:
        return False
    asked, (name, revision) = name, split_revision(name)
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
        HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except GatedRepoError:
        return False
    except RevisionNotFoundError as error:
        raise LimbeckError(
            f"'{name}' has no revision '{revision}' on the hub",
            expected="a branch, a tag or a whole commit hash of it",
            hint=f"{name}   (its newest state)",
        ) from error
    except RepositoryNotFoundError as error:
        if cached:  # a private one, and no login any more
            return False
        raise LimbeckError(
            f"the hub has no model '{name}'", expected="owner/name as the hub spells it, or a folder", hint=LOGIN
        ) from error
    except HFValidationError as error:
        raise LimbeckError(f"'{name}' is neither a folder nor a name on the hub", expected="owner/name") from error
    except OfflineModeIsEnabled:
        return False
    except Exception as error:
        if not _no_connection(error):
            return False
        if cached:
            console.print(f"the hub cannot be reached; '{name}' comes from its local cache", markup=False)
            _known[asked] = True
            return True
        raise LimbeckError(
            f"there is no folder '{name}', and the hub cannot be reached to look for a model of that name",
            expected="a folder, or a network for names on the hub",
        ) from error
    _known[asked] = False
    return False


def _no_connection(error: BaseException) -> bool:
    """Whether no connection came about, by the name of what httpx or requests raised."""
    seen: BaseException | None = error
    while seen is not None:
        names = {cls.__name__ for cls in type(seen).__mro__}
        if names & {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
