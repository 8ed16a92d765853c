"""The pipeline as Flyte workflows."""
