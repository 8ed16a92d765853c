"""The stages as Flyte tasks: decorators and transfer only."""
