"""How a service's methods answer: with a message, or with the status that Refused names."""

import functools
from collections.abc import Callable
from typing import Any

import grpc

from backend.registry import Refused


def answer(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def answered(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request)
        except Refused as refused:
            context.abort(grpc.StatusCode[refused.args[0]], refused.args[1])

    return answered
