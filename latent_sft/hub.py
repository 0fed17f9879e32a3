"""The Hugging Face Hub: who is asked for a token, and what its refusals mean. No message ever holds a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from latent_sft.errors import LatentSFTError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access (https://hf.co/settings/tokens)."


@contextmanager
def explained(repo_id: str, kind: type[LatentSFTError], unreachable: str) -> Iterator[None]:
    """Check name and token, and turn the errors of `huggingface_hub` into one message of ours in a `with` block.

    The token is the one `huggingface_hub` finds (HF_TOKEN, or stored by `hf auth login`); the server is that of
    HF_ENDPOINT.

    Args:
        repo_id: `user/name`, `organisation/name`, or `name` for one's own.
        kind: of error that is raised.
        unreachable: what can be done where no answer comes.

    Raises:
        LatentSFTError: of that kind: a bad name, no token, a refused token, or no way to reach the Hub.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise kind(f"{repo_id!r}: not a repository name ({error}) Expected user/name.") from error
    if get_token() is None:
        raise kind(f"{repo_id}: no Hugging Face token found. {LOGIN}")
    endpoint = constants.ENDPOINT
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise kind(f"{repo_id}: offline mode is on (HF_HUB_OFFLINE); unset it to upload.") from error
    except HfHubHTTPError as error:
        raise kind(f"{repo_id}: {_reason(error, endpoint)}") from error
    except HTTPError as error:  # the HTTP library's own: no answer came at all
        raise kind(
            f"{repo_id}: cannot reach {endpoint} ({type(error).__name__}). Check the network and proxy settings; "
            f"{unreachable}"
        ) from error
    except (RuntimeError, ValueError) as error:  # a transfer that broke off, or metadata that the Hub refuses
        raise kind(f"{repo_id}: the upload failed ({error}); push again.") from error


def _reason(error: HfHubHTTPError, endpoint: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"{endpoint} does not accept the token (401): wrong, expired or revoked. {LOGIN}"
    if status == 403:
        return f"the token may not write there (403): a read-only token, or another owner's name. {LOGIN}"
    if status == 404:
        return f"{endpoint} does not know this repository or branch (404)."
    return f"{endpoint} answered {status} ({error.server_message or 'no reason given'}); try again later."
