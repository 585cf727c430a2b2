"""Trackers by name, and secrets that neither they nor a file may see."""

import os
import re
from typing import Any

# Name, which is also that of the extra -> the package that it needs.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_MASK = "***"
# Variables of the environment whose values are secrets; what is shorter is none.
_SECRET = re.compile(r"(?:TOKEN|API_KEY|ACCESS_KEY|SECRET|SECRET_KEY|PASSWORD)$")
_SHORTEST = 8
_FORMS = re.compile(
    r"(://)[^/@\s]+(?=@)"  # user:password@host
    r"|([?&]\w*(?:token|key|secret|password|signature)=)[^&\s]+"
    r"|\bhf_[a-z\d]{30,}\b|\bwandb_v1_\w+",  # of 34 letters: hf_docs_2024 is a folder
    re.IGNORECASE,
)


def tracker_names(log_to: str) -> tuple[str, ...]:
    """Returns the trackers that are named, separated by commas.

    Raises:
        ValueError: One is unknown, or named twice.
    """
    names = tuple(name.strip() for name in log_to.split(",")) if log_to.strip() else ()
    for name in names:
        if name not in PACKAGES or names.count(name) > 1:
            problem = "is there twice" if name in PACKAGES else "is no tracker"
            raise ValueError(
                f"log_to {log_to!r}: {name!r} {problem}; give some of {', '.join(PACKAGES)},"
                " separated by commas"
            )
    return names


def masked(value: Any) -> Any:
    """Returns JSON values with `***` in place of secrets.

    Secrets are the values of environment variables such as HF_TOKEN and WANDB_API_KEY wherever
    they stand, passwords and tokens in addresses, and texts that have the form of a token.
    """
    found = {
        secret
        for name, secret in os.environ.items()
        if _SECRET.search(name) and len(secret) >= _SHORTEST
    }
    return _masked(value, sorted(found, key=len, reverse=True))


def _masked(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _masked(inner, secrets) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner, secrets) for inner in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, _MASK)
    return _FORMS.sub(lambda found: f"{found[1] or found[2] or ''}{_MASK}", value)
