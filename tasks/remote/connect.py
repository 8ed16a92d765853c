"""The backend that Flyte's own configuration names, and its errors as one line."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flytekit.clients.grpc_utils.deadline_interceptor import scoped_grpc_deadline
from flytekit.configuration import Config
from flytekit.exceptions.base import FlyteException
from flytekit.exceptions.system import FlyteSystemException, FlyteSystemUnavailableException
from flytekit.exceptions.user import (
    FlyteAuthenticationException,
    FlyteEntityNotExistException,
    FlyteInvalidInputException,
    FlyteTimeout,
)
from flytekit.loggers import logger
from flytekit.remote import FlyteRemote
from rich.console import Console
from rich.logging import RichHandler

from controlllm.errors import Outage, UserError

SECONDS = 60
"""That one request may take."""
HOME = Path("~/.flyte/config.yaml")


@dataclass(frozen=True)
class Place:
    """Where to look; what is left out stands in Flyte's configuration."""

    endpoint: str | None = None
    insecure: bool = False
    project: str | None = None
    domain: str | None = None


def connect(place: Place) -> FlyteRemote:
    """UserError where nothing says which backend is meant."""
    _keep_output_clean()
    if place.endpoint:
        config = Config.for_endpoint(place.endpoint, insecure=place.insecure)
    else:
        named = os.environ.get("FLYTECTL_CONFIG")  # asked by name: Config.auto() remembers the file it found first
        if named and not Path(named).is_file():
            raise UserError(f"FLYTECTL_CONFIG: {named} is no file; name Flyte's configuration, or give --endpoint")
        if not named and not HOME.expanduser().is_file() and "FLYTE_PLATFORM_URL" not in os.environ:
            raise UserError(
                f"no Flyte backend is set: FLYTECTL_CONFIG names no configuration, and {HOME} is not there; set it, "
                "or give --endpoint HOST:PORT"
            )
        config = Config.auto(named or None)
    project = place.project or os.environ.get("FLYTE_DEFAULT_PROJECT", "flytesnacks")
    domain = place.domain or os.environ.get("FLYTE_DEFAULT_DOMAIN", "development")
    return FlyteRemote(config, default_project=project, default_domain=domain)


def _keep_output_clean() -> None:
    """flytekit says its doubts about types on stdout, where scripts look for the name of a run."""
    for handler in logger.handlers:
        if isinstance(handler, RichHandler):
            handler.console = Console(stderr=True)
    if "FLYTE_SDK_LOGGING_LEVEL" not in os.environ:
        logger.setLevel(logging.ERROR)


@contextmanager
def answers(remote: FlyteRemote, about: str) -> Iterator[None]:
    """Inside, what the backend refuses or does not answer is a UserError of one line; about: what was asked for."""
    endpoint = remote.config.platform.endpoint
    try:
        with scoped_grpc_deadline(SECONDS):
            yield
    except FlyteEntityNotExistException:
        where = f"{remote.default_project}/{remote.default_domain}"
        raise UserError(f"{about}: not in {where} of {endpoint}; see controlllm runs ls, --project, --domain") from None
    except FlyteAuthenticationException:
        raise UserError(f"{endpoint}: refuses these credentials; see admin.authType in Flyte's configuration") from None
    except FlyteInvalidInputException as error:
        raise UserError(f"{about}: refused by Flyte: {_details(error)}") from None
    except (FlyteSystemUnavailableException, FlyteTimeout):
        raise Outage(
            f"{endpoint}: Flyte does not answer; check FLYTECTL_CONFIG or --endpoint (and --insecure without TLS)"
        ) from None
    except FlyteSystemException as error:
        raise Outage(f"{about}: Flyte at {endpoint} says: {_details(error)}") from None
    except FlyteException as error:
        raise UserError(f"{about}: {error}") from None


def _details(error: FlyteException) -> str:
    """Of the gRPC status behind an error of flytekit's."""
    details = getattr(error.__cause__, "details", None)
    return str(details() if callable(details) else error)
