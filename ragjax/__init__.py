"""Train a retriever and a language model together, in JAX.

This file imports nothing, so `import ragjax.losses` loads jax and nothing heavier.
"""


def __getattr__(name: str) -> str:
    """Returns `__version__`, that of the installed package."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("ragjax")
    except metadata.PackageNotFoundError:
        return "0+unknown"
