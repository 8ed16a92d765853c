"""Talking to a checkpoint of any stage in a terminal."""
