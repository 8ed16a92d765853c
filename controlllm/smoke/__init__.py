"""The smoke test: vLLM's own server, in a process of its own, must give the tokens that transformers gives."""
