"""When runs start by themselves, who hears how they ended, and how long a run waits for a person."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field

from controlllm.config.base import Config, Number

_FIELD = r"[0-9A-Za-z*/,\-]+"
Cron = Annotated[str, Field(pattern=rf"^{_FIELD}( {_FIELD}){{4}}$")]
Address = Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")]


DATED = r"-\d{4}-\d{2}-\d{2}-\d{4}"
"""What `dated` puts behind a name."""


class PromoteConfig(Config):
    """What has to happen before a tuned model becomes the run's model."""

    approval: bool = False
    """On a cluster a person is asked, too, once the report is there; the gate (benchmark.gate) counts as well."""


class Notify(Config):
    """Mail at the end of a run that a launch plan started."""

    email: list[Address] = []
    """Mail addresses."""
    slack: list[Address] = []
    """A Slack channel's mail addresses."""
    pagerduty: list[Address] = []
    """A PagerDuty service's mail addresses."""
    on: list[Literal["succeeded", "failed", "timed_out", "aborted"]] = Field(
        default=["failed", "timed_out", "aborted"], min_length=1
    )
    """The ends that are told."""


class Launch(Config):
    """Of the launch plans; all times are UTC."""

    nightly: Cron = "0 2 * * *"
    """Of `finetune-nightly`: minute, hour, day, month, weekday."""
    weekly: Cron = "0 4 * * 0"
    """Of `benchmark-weekly`."""
    notify: Notify = Notify()
    """Who hears how a run ended."""
    approval_hours: Annotated[Number, Field(gt=0)] = 24.0
    """How long a run whose recipe says promote.approval waits for an answer; then it fails."""


def dated(name: str, tick: datetime) -> str:
    """A scheduled run's name, which no other tick has, whatever the schedule."""
    return f"{name[:47]}-{tick.astimezone(UTC):%Y-%m-%d-%H%M}"
