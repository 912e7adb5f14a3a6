"""Numbers for a Prometheus server to fetch: as text, and at a port of each rank's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from skyrl.types import UserError

Values = Callable[[], Mapping[str, float]]


def metric_name(key: str) -> str:
    """What Prometheus calls a key: "reward:mean" is skyrl_reward_mean."""
    return "skyrl_" + re.sub(r"[^a-zA-Z0-9]+", "_", key).strip("_")


class _Collector:
    def __init__(self, values: Values, labels: Mapping[str, str]) -> None:
        self.values, self.labels = values, labels

    def collect(self) -> Iterator[Any]:
        """Every value as it is now, each a gauge; counts that only grow are named so by their keys."""
        from prometheus_client.core import GaugeMetricFamily

        for name, (key, value) in {metric_name(key): (key, value) for key, value in self.values().items()}.items():
            family = GaugeMetricFamily(name, key, labels=list(self.labels))
            family.add_metric(list(self.labels.values()), value)
            yield family


def _library(option: str) -> ModuleType:
    try:
        import prometheus_client
    except ImportError:
        raise UserError(f'{option}: needs prometheus-client; pip install "skyrl-spmd[prometheus]"') from None
    return prometheus_client


def exposition(values: Values, labels: Mapping[str, str]) -> bytes:
    """The text that Prometheus reads. Raises UserError without its client library."""
    library = _library("/metrics")
    registry = library.CollectorRegistry()
    registry.register(_Collector(values, labels))
    return library.generate_latest(registry)


class PrometheusExporter:
    """Answers at a port, from a thread of its own, until `close`."""

    def __init__(self, host: str, port: int, values: Values, labels: Mapping[str, str]) -> None:
        """Raises UserError for a port that is taken, and without the client library."""
        option = f"tracking.prometheus_port={port}"
        library = _library(option)
        registry = library.CollectorRegistry()
        registry.register(_Collector(values, labels))
        try:
            self._server, self._thread = library.start_http_server(port, host, registry)
        except (OSError, OverflowError) as problem:
            raise UserError(
                f"{option}: cannot listen on {host} ({problem}); each rank takes this port plus its number on the "
                "node: give one from which that many are free, or 0"
            ) from None

    def close(self) -> None:
        """Gives the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
