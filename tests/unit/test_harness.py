"""Sharing the question's tokens changes no number that lm-evaluation-harness gives."""

import pytest
import torch

from controlllm.control.model import expand_model
from controlllm.control.settings import ControlSettings
from controlllm.harness import HFLM, CountingLM


@pytest.mark.parametrize("control", [False, True])
def test_same_answers_as_the_harness(tiny_model, tokenizer, control):
    model = expand_model(tiny_model, ControlSettings(sites=[1, 3])).eval() if control else tiny_model
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(2, 258, (n,), generator=generator).tolist()  # noqa: E731
    questions = [ids(n) for n in (5, 1, 30, 12)]
    requests = [(("q", "a"), question, ids(n)) for question in questions for n in (1, 7, 3)]
    requests += [((None), ids(1), ids(40))]
    done = []
    ours = CountingLM(model, tokenizer, 3, lambda n, note="": done.append(n))._loglikelihood_tokens(requests)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )
    assert [hit for _, hit in ours] == [hit for _, hit in theirs]
    assert [chance for chance, _ in ours] == pytest.approx([chance for chance, _ in theirs], abs=1e-4)
    assert done[-1] == len(requests)
