"""Sending an upload plan: one commit, so that the repository has all of it or nothing.

    url = push_to_hub(upload_plan)

Whatever the hub answers that is not success becomes a LimbeckError with what to do about it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from limbeck.core.errors import LimbeckError
from limbeck.report.upload_plan import UploadPlan

LOGIN_HINT = "hf auth login   (or set HF_TOKEN)"
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin")


def push_to_hub(upload_plan: UploadPlan, endpoint: str | None = None) -> str:
    """Send an upload plan and return the address of the commit (of the last one, where nothing has changed).

    Weights and code of an earlier push that the upload plan does not have are deleted in the same commit: transformers
    would load them. All other files of the repository stay.

    Args:
        endpoint: of a hub that is not huggingface.co.

    Raises:
        LimbeckError: no token, no right, no network, offline mode, a public repository where a private one was asked
            for, a repository of another model, or anything else that the hub answers.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id, api = get_full_repo_name(upload_plan.repo_id, endpoint), _api(endpoint)
    with _explained(api.endpoint, repo_id):
        api.create_repo(repo_id, private=upload_plan.private, exist_ok=True)
        info = api.model_info(repo_id)
        there = [sibling.rfilename for sibling in info.siblings or []]
        if upload_plan.private and info.private is False:
            raise LimbeckError(
                f"{repo_id} exists and is public",
                expected="a private repository",
                hint="another name, or make it private in its settings first",
            )
        ours = "limbeck" in (info.tags or []) or (info.config or {}).get("model_type") == "limbeck"
        if any(name.endswith(WEIGHT_SUFFIXES) for name in there) and not ours:
            raise LimbeckError(
                f"{repo_id} holds a model that is no student",
                expected="a new repository, or one that `limbeck push` made",
                hint=f"limbeck push ... {repo_id}-student",
            )
        sent = {item.path_in_repo for item in upload_plan.files}
        stale = [n for n in there if n not in sent and n.endswith((*WEIGHT_SUFFIXES, ".py"))]
        additions = [
            CommitOperationAdd(
                item.path_in_repo, item.content if isinstance(item.content, bytes) else str(item.content)
            )
            for item in upload_plan.files
        ]
        deletions = [CommitOperationDelete(name) for name in stale]
        done = api.create_commit(repo_id, [*additions, *deletions], commit_message=upload_plan.commit_message)
    return str(done.commit_url)


def get_full_repo_name(repo_id: str, endpoint: str | None = None) -> str:
    """`owner/name`: a name alone becomes one of the token's owner."""
    if "/" in repo_id:
        return repo_id
    api = _api(endpoint)
    with _explained(api.endpoint, repo_id):
        return f"{api.whoami()['name']}/{repo_id}"


def check_hub_access(endpoint: str | None = None) -> None:
    """Raises LimbeckError where a push could not even begin: no token, or offline mode."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise _offline()
    if get_token() is None:
        raise LimbeckError("there is no token for the hub here", expected="one that may write", hint=LOGIN_HINT)


def _api(endpoint: str | None) -> Any:
    from huggingface_hub import HfApi, get_token

    check_hub_access()
    return HfApi(endpoint=endpoint, token=get_token(), library_name="limbeck")


def _offline() -> LimbeckError:
    return LimbeckError(
        "the hub is switched off by HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE)",
        expected="both unset",
        hint="env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE limbeck push ...; --dry-run works offline",
    )


@contextmanager
def _explained(endpoint: str, repo_id: str) -> Iterator[None]:
    """Turn what the hub's library raises into a LimbeckError. It has many kinds, of several HTTP libraries."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        raise _explain(error, endpoint, repo_id) from error


def _explain(error: BaseException, endpoint: str, repo_id: str) -> LimbeckError:
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
            return _answered(found, endpoint, repo_id)
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
        f"the push to {repo_id} failed: {_gist(chain[-1])}",
        hint="the same command again; what has arrived is not sent twice",
    )


def _answered(error: Any, endpoint: str, repo_id: str) -> LimbeckError:
    """The hub's refusal in words, by its status."""
    status = error.response.status_code
    said = error.server_message or _gist(error)
    owner = repo_id.split("/")[0] if "/" in repo_id else "its owner"
    words = {
        401: ("the hub does not know the token", "a valid token that may write", LOGIN_HINT),
        403: (f"the token may not write to {repo_id}", f"a token with write access to {owner}", LOGIN_HINT),
        404: (
            f"{endpoint} has no {repo_id}, or hides it from this token",
            "a repository that the token may see",
            LOGIN_HINT,
        ),
        413: (f"{endpoint} finds a file too large", None, "smaller parts: save_pretrained(max_shard_size='2GB')"),
        429: (f"{endpoint} has had too many requests", None, "the same command later"),
    }
    found, expected, hint = words.get(status, (f"{endpoint} refused the push to {repo_id}", None, None))
    if status >= 500:
        found, hint = f"{endpoint} is in trouble", "the same command later; what has arrived is not sent twice"
    return LimbeckError(f"{found} ({status}: {said})", expected=expected, hint=hint)


def _gist(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
