"""The Hugging Face hub: waited for some seconds and no longer, and its refusals said in one line with what to do.

`huggingface_hub` itself waits for ever where a request has no limit of its own, and for a name to be resolved.
"""

import os
import threading
from collections.abc import Callable
from typing import Literal

import httpx
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

Kind = Literal["model", "dataset"]

# Seconds to wait for an answer. The hub's own variable sets another limit; its default of 10 s is longer than a person
# who has mistyped a proxy likes to wait.
PATIENCE = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else 4
ERRORS = (HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, httpx.HTTPError, OSError)
LOG_IN = "log in (`hf auth login`, or HF_TOKEN)"


class HubError(Exception):
    """The hub does not answer, or does not give what it is asked for; the message is `explain`'s."""


_answers: dict[tuple[str, Kind], str | HubError] = {}  # a command asks the hub once for each


def revision(name: str, kind: Kind) -> str:
    """The commit of the newest version of the repository `name`, asked for once in this process.

    Raises:
        HubError: there is no such repository for this user, or no answer within PATIENCE.
    """
    question = name, kind
    if question not in _answers:
        _answers[question] = _ask(name, kind)
    answer = _answers[question]
    if isinstance(answer, HubError):
        raise answer
    return answer


def explain(error: Exception, name: str, kind: Kind) -> str:
    """What the hub answered instead, and what to do: a clause whose subject is the hub.

    Args:
        error: one of ERRORS.
        name: of the repository.
        kind: of the repository.
    """
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HFValidationError):
        return "the hub's names are OWNER/NAME, of letters, digits, `-`, `_` and `.`"
    if isinstance(error, GatedRepoError):
        folder = "datasets/" if kind == "dataset" else ""
        return f"the hub has it gated: accept its licence at https://{_host()}/{folder}{name}, then {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such {kind}; for a private one {LOG_IN}"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error.response)
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return f"the hub ({_host()}) has not answered for {PATIENCE:g} s: check the network and HTTPS_PROXY"
    lines = str(error).splitlines()
    cause = lines[0] if lines else type(error).__name__
    return f"the hub ({_host()}) can't be reached ({cause}): check the network and HTTPS_PROXY"


def _explain_status(response: httpx.Response) -> str:
    status = response.status_code
    if status == httpx.codes.UNAUTHORIZED:
        return f"the hub refuses the token (401): {LOG_IN} again"
    if status == httpx.codes.FORBIDDEN:
        return f"the hub forbids it (403): {LOG_IN} with a token that may read it"
    if status == httpx.codes.TOO_MANY_REQUESTS:
        seconds = response.headers.get("Retry-After", "")
        pause = f"in {seconds} s" if seconds.isdecimal() else "later"
        return f"the hub has had too many requests from here (429): try again {pause}; to be allowed more, {LOG_IN}"
    return f"the hub fails ({status}): try again later"


def _ask(name: str, kind: Kind) -> str | HubError:
    if constants.HF_HUB_OFFLINE:
        return HubError(explain(OfflineModeIsEnabled(), name, kind))
    try:
        return _within_patience(lambda: str(HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE).sha))
    except ERRORS as error:
        return HubError(explain(error, name, kind))


def _within_patience(ask: Callable[[], str]) -> str:
    """What `ask` returns or raises.

    In a thread of its own: the time that resolving a host's name takes has no limit of its own.

    Raises:
        TimeoutError: it has done neither within PATIENCE.
    """
    outcome: list[str | BaseException] = []

    def run() -> None:
        try:
            outcome.append(ask())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not outcome:
        raise TimeoutError
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _host() -> str:
    """The hub's host, without a name and password that HF_ENDPOINT may have."""
    url = httpx.URL(constants.ENDPOINT)
    return url.host if url.port is None else f"{url.host}:{url.port}"
