"""How llama.cpp names the parts of a GGUF file that was split."""

import re

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def split_names(name: str) -> list[str]:
    """Return the names of all parts of a split file by the name of one; of others, that name."""
    match = _SPLIT_NAME.fullmatch(name)
    if not match or not 1 <= int(match["part"]) <= int(match["count"]):
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]
