"""A page for each stage's output: what a person looks at first, in Flyte's console or as a file."""

from controlllm.decks.choose import STAGES, deck_of, folder_of
from controlllm.decks.train import live_page

__all__ = ["STAGES", "deck_of", "folder_of", "live_page"]
