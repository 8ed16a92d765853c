"""A page for each stage's output: what a person looks at first, in Flyte's console or as a file."""

from controlllm.decks.choose import STAGES, deck_of, decks_of, folder_of, gate_deck, lineage_deck
from controlllm.decks.train import live_page

__all__ = ["STAGES", "deck_of", "decks_of", "folder_of", "gate_deck", "lineage_deck", "live_page"]
