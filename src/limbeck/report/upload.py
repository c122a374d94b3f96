"""Upload a plan to the Hugging Face Hub in one commit, so that the repository has all of it or nothing.

    url = push_to_hub(upload_plan)

Every refusal of the Hub becomes a LimbeckError that says what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from limbeck.core.errors import LimbeckError
from limbeck.models.export.record import EXPORT_FOLDER
from limbeck.report.upload_plan import UploadPlan

LOGIN_HINT = "hf auth login   (or set HF_TOKEN)"
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin")


def push_to_hub(upload_plan: UploadPlan, endpoint: str | None = None) -> str:
    """Upload a plan and return the URL of the commit (of the last one, if nothing has changed).

    Weights, code and exports of an earlier push that the plan does not have are deleted in the same commit:
    transformers would load them, or they would be of another student. All other files of the repository stay.

    Args:
        endpoint: the URL of a Hub other than huggingface.co.

    Raises:
        LimbeckError: no token, no permission, no network, offline mode, a public repository where a private one was
            requested, a repository of another model, or any other refusal.
    """
    repo_id, api = get_full_repo_name(upload_plan.repo_id, endpoint), _api(endpoint)
    with _converted_errors(api.endpoint, repo_id):
        api.create_repo(repo_id, private=upload_plan.private, exist_ok=True)
        info = api.model_info(repo_id)
        existing = [sibling.rfilename for sibling in info.siblings or []]
        if upload_plan.private and info.private is False:
            raise LimbeckError(
                f"{repo_id} exists and is public",
                expected="a private repository",
                hint="use another name, or make it private in its settings first",
            )
        ours = "limbeck" in (info.tags or []) or (info.config or {}).get("model_type") == "limbeck"
        if any(name.endswith(WEIGHT_SUFFIXES) for name in existing) and not ours:
            raise LimbeckError(
                f"{repo_id} holds a model that is not a student",
                expected="a new repository, or one created by `limbeck push`",
                hint=f"limbeck push ... {repo_id}-student",
            )
        sent = {item.path_in_repo for item in upload_plan.files}
        stale = [n for n in existing if n not in sent and n.endswith((*WEIGHT_SUFFIXES, ".py"))]
        stale += [n for n in existing if n not in {*sent, *stale} and n.startswith(f"{EXPORT_FOLDER}/")]
        additions = [
            CommitOperationAdd(
                item.path_in_repo, item.content if isinstance(item.content, bytes) else str(item.content)
            )
            for item in upload_plan.files
        ]
        deletions = [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(repo_id, [*additions, *deletions], commit_message=upload_plan.commit_message)
    return str(commit.commit_url)


def get_full_repo_name(repo_id: str, endpoint: str | None = None) -> str:
    """Complete a repository's name to `owner/name`; the owner is the token's by default."""
    if "/" in repo_id:
        return repo_id
    api = _api(endpoint)
    with _converted_errors(api.endpoint, repo_id):
        return f"{api.whoami()['name']}/{repo_id}"


def check_hub_access(endpoint: str | None = None) -> None:
    """Raise LimbeckError if a push could not even begin: no token, or offline mode."""
    if constants.HF_HUB_OFFLINE:
        raise _offline_error()
    if get_token() is None:
        raise LimbeckError("no Hugging Face token found", expected="a token with write access", hint=LOGIN_HINT)


def _api(endpoint: str | None) -> Any:
    check_hub_access()
    return HfApi(endpoint=endpoint, token=get_token(), library_name="limbeck")


def _offline_error() -> LimbeckError:
    return LimbeckError(
        "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) disables the Hub",
        expected="both unset",
        hint="env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE limbeck push ...; --plan works offline",
    )


@contextmanager
def _converted_errors(endpoint: str, repo_id: str) -> Iterator[None]:
    """Turn every exception of the Hub's library, which come from several HTTP libraries, into a LimbeckError."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        raise _convert_error(error, endpoint, repo_id) from error


def _convert_error(error: BaseException, endpoint: str, repo_id: str) -> LimbeckError:
    # the threads of an upload wrap the exception that says what happened
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled):
            return _offline_error()
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, endpoint, repo_id)
    for cause in chain:
        module = type(cause).__module__
        if isinstance(cause, ConnectionError | TimeoutError) or module.startswith(("httpx", "requests")):
            return LimbeckError(
                f"cannot reach {endpoint}: {_shorten(cause)}",
                expected="a network connection to the Hub",
                hint="run the same command later, or --plan, which needs no network",
            )
    return LimbeckError(
        f"the upload to {repo_id} failed: {_shorten(chain[-1])}",
        hint="run the same command again; files that have arrived are not sent twice",
    )


def _refusal(error: Any, endpoint: str, repo_id: str) -> LimbeckError:
    """Explain a refusal of the Hub by its HTTP status."""
    status = error.response.status_code
    owner = repo_id.split("/")[0] if "/" in repo_id else "its owner"
    explanations: dict[int, tuple[str, str | None, str]] = {
        401: ("the Hub rejected the token", "a valid token with write access", LOGIN_HINT),
        403: (f"the token cannot write to {repo_id}", f"a token with write access to {owner}", LOGIN_HINT),
        404: (f"{endpoint} has no {repo_id}, or this token cannot see it", "a visible repository", LOGIN_HINT),
        413: (
            f"a file is too large for {endpoint}",
            None,
            "smaller shards: save_pretrained(max_shard_size='2GB')",
        ),
        429: (f"{endpoint} received too many requests", None, "run the same command later"),
    }
    problem, expected, hint = explanations.get(status, (f"{endpoint} refused the upload to {repo_id}", None, None))
    if status >= 500:
        problem = f"{endpoint} failed"
        hint = "run the same command later; files that have arrived are not sent twice"
    return LimbeckError(
        f"{problem} ({status}: {error.server_message or _shorten(error)})", expected=expected, hint=hint
    )


def _shorten(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
