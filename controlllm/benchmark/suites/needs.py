"""What some tasks need besides lm-eval: said before anything runs, in one line."""

import importlib.util
from collections.abc import Iterable
from importlib import metadata

from controlllm.errors import UserError

PUNKT = "punkt_tab"
ANTLR = "4.11"
INSTALL = "pip install 'controlllm[benchmarks]'"


def require(task: str, needs: Iterable[str]) -> None:
    """UserError for the first of `needs` that is not there."""
    for need in needs:
        if need == PUNKT:
            _require_punkt(task)
        elif importlib.util.find_spec(need) is None:
            raise UserError(f"{task} needs the package {need}, which is not installed; {INSTALL}")
        elif need == "antlr4" and not (found := metadata.version("antlr4-python3-runtime")).startswith(ANTLR):
            raise UserError(f"{task} needs antlr4-python3-runtime {ANTLR}, found {found}; {INSTALL}")


def _require_punkt(task: str) -> None:
    """NLTK's sentence splitter, which lm-eval's IFEval counts sentences with; fetched where there is a network."""
    import nltk

    try:
        nltk.data.find(f"tokenizers/{PUNKT}")
    except LookupError:
        if not nltk.download(PUNKT, quiet=True):
            raise UserError(
                f"{task} needs NLTK's data {PUNKT}, and there is no network to fetch it; put a folder with "
                f"tokenizers/{PUNKT} where the variable NLTK_DATA says"
            ) from None
