"""Put an export on a model hub: only when told to, only where told, private unless told otherwise."""

import os
from pathlib import Path

import httpx
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from posttrain.convert.card import CARD, verification
from posttrain.errors import UserError
from posttrain.models.hf import is_hub_id
from posttrain.models.hf_adapter import base_of, is_adapter


def token_for(repo: str | None) -> str:
    """The token to push with, once repository and token are named; before anything is converted.

    Raises:
        UserError: one of them is missing or malformed, or the hub is switched off.
    """
    if repo is None:
        raise UserError("`convert.repo`: has no value; say where to push to, convert.repo=OWNER/NAME")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise UserError("`convert.repo`: must be OWNER/NAME of a model hub's repository")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError("convert.push=true: needs a write token of the hub in the environment variable HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise UserError("convert.push=true: HF_HUB_OFFLINE is set, which keeps everything from the hub")
    return token


def check_pushable(directory: Path, allow_unverified: bool) -> None:
    """Refuse a directory that others could not trust or not load.

    Args:
        directory: a finished export.
        allow_unverified: push it though its logits were not compared with the trained model's.

    Raises:
        UserError: it has no model card, was not verified, or is an adapter of a model that only this machine has.
    """
    if not (directory / CARD).is_file():
        raise UserError(f"{directory}: has no model card ({CARD}); export it again")
    report = verification(directory)
    if not allow_unverified and not (report and report["logits"]["checked"]):
        raise UserError(
            f"{directory}: its logits were not compared with the trained model's; convert.allow_unverified=true pushes "
            "it anyway"
        )
    if not is_adapter(directory):
        return
    base = base_of(directory)
    if not is_hub_id(base):
        raise UserError(
            f"{directory}: is an adapter of {base}, which only this machine has; merge it first, or write the base's "
            "hub id as base_model_name_or_path into its adapter_config.json"
        )


def upload(directory: Path, repo: str, token: str, private: bool) -> str:
    """Upload all files; returns the repository's address.

    Raises:
        UserError: the hub refuses, can't be reached, or has a public repository of that name and `private` is true.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(f"convert.repo={repo}: exists and is public; convert.private=false pushes to it")
        api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Upload an export of posttrain")
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"convert.repo={repo}: the hub refuses or can't be reached: {reason}") from error
    return str(url)
