"""What the processes of the engine say of themselves. vLLM mixes this class into its workers."""

import resource
from typing import Any

TRANSFORMERS_BACKEND = "vllm.model_executor.models.transformers"


class EngineFacts:
    """Asked through vLLM's `collective_rpc`; needs nothing but vLLM."""

    def controlllm_facts(self: Any) -> dict[str, Any]:
        """Memory in bytes: of the process at its most, of the accelerator at its most, of the KV cache here."""
        import torch

        config = self.model_runner.kv_cache_config
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        model = type(self.get_model())
        borrowed = any(kind.__module__.startswith(TRANSFORMERS_BACKEND) for kind in model.__mro__)
        return {
            "model_class": model.__name__,
            "layers": "transformers'" if borrowed else "vLLM's own",
            "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "gpu": gpu,
            "kv_cache": max(tensor.size for tensor in config.kv_cache_tensors),  # parts of one allocation
            "kv_cache_tokens": config.num_blocks * self.vllm_config.cache_config.block_size,
        }
