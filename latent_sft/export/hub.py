"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from latent_sft.errors import ExportError
from latent_sft.export.checkpoint import is_export

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access (https://hf.co/settings/tokens)."


def push(folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Create the repository where it is not there yet and upload a folder as one commit.

    The token is the one `huggingface_hub` finds (HF_TOKEN, or stored by `hf auth login`); it is never printed. The
    server is that of HF_ENDPOINT. Files that are in the repository and not in the folder stay there.

    Args:
        folder: an exported folder.
        repo_id: `user/name` or `organisation/name`; `name` alone is one's own.
        private: of a new repository; an existing one keeps its visibility.
        revision: branch, made where it is not there; None is the default branch.

    Returns:
        The address of the repository.

    Raises:
        ExportError: not an export, a bad name, no token, a refused token, or no way to reach the Hub.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    if not is_export(folder):
        raise ExportError(f"{folder}: not an exported folder; write one with `latent-sft export`.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(f"{repo_id!r}: not a repository name ({error}) Expected user/name.") from error
    if get_token() is None:
        raise ExportError(f"{repo_id}: no Hugging Face token found. {LOGIN}")
    api = HfApi(library_name="latent_sft")
    try:
        # None leaves the choice to the owner's settings, which may say private
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, revision=revision, commit_message="Upload with latent_sft"
        )
    except OfflineModeIsEnabled as error:
        raise ExportError(f"{repo_id}: offline mode is on (HF_HUB_OFFLINE); unset it to upload.") from error
    except HfHubHTTPError as error:
        raise ExportError(f"{repo_id}: {_reason(error, api.endpoint)}") from error
    except HTTPError as error:  # the HTTP library's own: no answer came at all
        raise ExportError(
            f"{repo_id}: cannot reach {api.endpoint} ({type(error).__name__}). Check the network and proxy settings; "
            f"the export in {folder} is complete and can be pushed later."
        ) from error
    except (RuntimeError, ValueError) as error:  # a transfer that broke off, or metadata that the Hub refuses
        raise ExportError(f"{repo_id}: the upload failed ({error}); push again.") from error
    return str(repo)


def _reason(error: HfHubHTTPError, endpoint: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"{endpoint} does not accept the token (401): wrong, expired or revoked. {LOGIN}"
    if status == 403:
        return f"the token may not write there (403): a read-only token, or another owner's name. {LOGIN}"
    if status == 404:
        return f"{endpoint} does not know this repository or branch (404)."
    return f"{endpoint} answered {status} ({error.server_message or 'no reason given'}); try again later."
