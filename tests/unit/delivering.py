"""Models of a method as if they had been trained, and what is delivered of them."""

import torch
from safetensors.torch import save_file

from controlllm.config import ExportConfig, Method, ModelConfig
from controlllm.consolidate import consolidate
from controlllm.store import run_stage
from controlllm.train.model import load_model
from controlllm.train.trained import trained_tensors


def loaded(base, dtype="float32", seed=0, attention="sdpa", **method):
    model = ModelConfig(name="base", dtype=dtype, attention=attention)
    return load_model(base, model, Method.model_validate(method), seed=seed)


def perturbed(model):
    """As if it had been trained."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def deliver(base, folder, *, export=None, **method):
    """The consolidated folder, and the trained model that it was made of; needs a store."""
    model = perturbed(loaded(base, **method))

    def build(made):
        save_file({k: v.contiguous() for k, v in trained_tensors(model).items()}, made / "trained.safetensors")

    shards = folder / "shards"
    shards.mkdir()
    run = run_stage("train", config=method, parents={"ingest model": base, "prepare": shards}, build=build)
    made = consolidate(base, run.path, Method.model_validate(method), ExportConfig.model_validate(export or {}))
    return made.path, model
