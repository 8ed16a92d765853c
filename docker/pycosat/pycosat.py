"""Stands in for pycosat, which has no wheels and needs a C compiler.

reasoning-gym imports it at its start and uses it for zebra puzzles only.
"""


def __getattr__(name: str) -> object:
    raise AttributeError(f"pycosat.{name}: this is a stand-in; zebra puzzles need the real one: pip install pycosat")
