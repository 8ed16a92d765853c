"""What can be known to be wrong with what a report shows beside scores, before anything is trained."""

from controlllm.config import RunConfig
from controlllm.errors import UserError


def report_mistake(config: RunConfig) -> str | None:
    """`key: what is wrong and the way out` of the first mistake in the sections report and probe, or None."""
    if config.name in config.report.contrast:
        return f"report.contrast: {config.name} is this run itself; leave it out"
    if config.probe is None:
        return None
    from controlllm.probe.prompts import check_prompts

    try:
        check_prompts(config.probe)
    except UserError as error:
        return f"probe.prompts: {str(error).removeprefix('--').removeprefix('prompts').lstrip(': ')}"
    return None
