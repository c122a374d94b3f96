"""Sending a parcel: one commit, so that the repository has all of it or nothing.

    url = push(parcel)

Whatever the hub answers that is not success becomes a LimbeckError with what to do about it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.publish.parcel import Parcel

LOGIN = "hf auth login   (or set HF_TOKEN)"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")


def push(parcel: Parcel, endpoint: str | None = None) -> str:
    """Send a parcel and return the address of the commit (of the last one, where nothing has changed).

    Weights and code of an earlier push that the parcel does not have are deleted in the same commit: transformers
    would load them. All other files of the repository stay.

    Args:
        endpoint: of a hub that is not huggingface.co.

    Raises:
        LimbeckError: no token, no right, no network, offline mode, a public repository where a private one was asked
            for, a repository of another model, or anything else that the hub answers.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, api = full_name(parcel.repo, endpoint), _api(endpoint)
    with _explained(api.endpoint, repo):
        api.create_repo(repo, private=parcel.private, exist_ok=True)
        info = api.model_info(repo)
        there = [sibling.rfilename for sibling in info.siblings or []]
        if parcel.private and info.private is False:
            raise LimbeckError(
                f"{repo} exists and is public",
                expected="a private repository",
                hint="another name, or make it private in its settings first",
            )
        ours = "limbeck" in (info.tags or []) or (info.config or {}).get("model_type") == "limbeck"
        if any(name.endswith(WEIGHTS) for name in there) and not ours:
            raise LimbeckError(
                f"{repo} holds a model that is no student",
                expected="a new repository, or one that `limbeck push` made",
                hint=f"limbeck push ... {repo}-student",
            )
        sent = {item.path for item in parcel.items}
        stale = [n for n in there if n not in sent and n.endswith((*WEIGHTS, ".py"))]
        additions = [
            CommitOperationAdd(item.path, item.content if isinstance(item.content, bytes) else str(item.content))
            for item in parcel.items
        ]
        deletions = [CommitOperationDelete(name) for name in stale]
        done = api.create_commit(repo, [*additions, *deletions], commit_message=parcel.message)
    return str(done.commit_url)


def full_name(repo: str, endpoint: str | None = None) -> str:
    """`owner/name`: a name alone becomes one of the token's owner."""
    if "/" in repo:
        return repo
    api = _api(endpoint)
    with _explained(api.endpoint, repo):
        return f"{api.whoami()['name']}/{repo}"


def check_ready(endpoint: str | None = None) -> None:
    """Raises LimbeckError where a push could not even begin: no token, or offline mode."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise _offline()
    if get_token() is None:
        raise LimbeckError("there is no token for the hub here", expected="one that may write", hint=LOGIN)


def _api(endpoint: str | None) -> Any:
    from huggingface_hub import HfApi, get_token

    check_ready()
    return HfApi(endpoint=endpoint, token=get_token(), library_name="limbeck")


def _offline() -> LimbeckError:
    return LimbeckError(
        "the hub is switched off by HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE)",
        expected="both unset",
        hint="env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE limbeck push ...; --dry-run works offline",
    )


@contextmanager
def _explained(endpoint: str, repo: str) -> Iterator[None]:
    """Turn what the hub's library raises into a LimbeckError. It has many kinds, of several HTTP libraries."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        raise _explain(error, endpoint, repo) from error


def _explain(error: BaseException, endpoint: str, repo: str) -> LimbeckError:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain: list[BaseException] = []  # an upload's threads wrap what went wrong
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__
    for found in chain:
        if isinstance(found, OfflineModeIsEnabled):
            return _offline()
        if isinstance(found, HfHubHTTPError):
            return _answered(found, endpoint, repo)
    for found in chain:
        if isinstance(found, ConnectionError | TimeoutError) or type(found).__module__.startswith(
            ("httpx", "requests")
        ):
            return LimbeckError(
                f"{endpoint} cannot be reached: {_gist(found)}",
                expected="a network that reaches the hub",
                hint="the same command later, or --dry-run, which needs none",
            )
    return LimbeckError(
        f"the push to {repo} failed: {_gist(chain[-1])}",
        hint="the same command again; what has arrived is not sent twice",
    )


def _answered(error: Any, endpoint: str, repo: str) -> LimbeckError:
    """The hub's refusal in words, by its status."""
    status = error.response.status_code
    said = error.server_message or _gist(error)
    owner = repo.split("/")[0] if "/" in repo else "its owner"
    words = {
        401: ("the hub does not know the token", "a valid token that may write", LOGIN),
        403: (f"the token may not write to {repo}", f"a token with write access to {owner}", LOGIN),
        404: (f"{endpoint} has no {repo}, or hides it from this token", "a repository that the token may see", LOGIN),
        413: (f"{endpoint} finds a file too large", None, "smaller parts: save_pretrained(max_shard_size='2GB')"),
        429: (f"{endpoint} has had too many requests", None, "the same command later"),
    }
    found, expected, hint = words.get(status, (f"{endpoint} refused the push to {repo}", None, None))
    if status >= 500:
        found, hint = f"{endpoint} is in trouble", "the same command later; what has arrived is not sent twice"
    return LimbeckError(f"{found} ({status}: {said})", expected=expected, hint=hint)


def _gist(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
