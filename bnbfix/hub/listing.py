"""Lists what is on the Hub: the models of an organization, the pull requests of a repo."""

from __future__ import annotations

from huggingface_hub import HfApi

from .client import describe_request, retry, wrap_errors


def list_models(org: str) -> dict[str, str | None]:
    """Return the models of an organization or user that the token may see, each with its commit. Raises HubError."""
    asked = describe_request(org, None)
    with wrap_errors(asked):
        return retry(lambda: {m.id: m.sha for m in HfApi().list_models(author=org, expand=["sha"])}, asked)


def list_pull_requests(repo: str, title: str) -> list[tuple[int, str]]:
    """Return (number, address) of the pull requests with a title, open and closed, oldest first. Raises HubError."""
    asked = describe_request(repo, None)

    def ask() -> list[tuple[int, str]]:
        found = HfApi().get_repo_discussions(repo, discussion_type="pull_request")
        return sorted((d.num, d.url) for d in found if d.title == title)

    with wrap_errors(asked):
        return retry(ask, asked)
