"""A Flyte backend on loopback for tests: admin, data proxy, engine and pods, of real requests and real processes.

Pods are subprocesses that run the packaged container arguments. Nothing of the project is imported here.
"""

from backend.server import Backend

__all__ = ["Backend"]
