"""Runs on a Flyte backend: listed, shown, compared, started again: `controlllm runs`, in a process of its own."""
