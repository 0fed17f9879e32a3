"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from latent_sft.errors import ExportError
from latent_sft.export.checkpoint import is_export
from latent_sft.hub import explained


def push(folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Create the repository where it is not there yet and upload a folder as one commit.

    Token and server: see `hub.explained`. Files that are in the repository and not in the folder stay there.

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
    from huggingface_hub import HfApi

    if not is_export(folder):
        raise ExportError(f"{folder}: not an exported folder; write one with `latent-sft export`.")
    with explained(repo_id, ExportError, f"the export in {folder} is complete and can be pushed later."):
        api = HfApi(library_name="latent_sft")
        # None leaves the choice to the owner's settings, which may say private
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, revision=revision, commit_message="Upload with latent_sft"
        )
    return str(repo)
