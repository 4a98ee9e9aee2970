"""What happens while Lexmill works: events, the sinks they go to, and the metrics of a server."""

from lexmill.monitor.events import Event, Fanout, JsonlSink, Sink, read_events
from lexmill.monitor.progress import ProgressSink
from lexmill.monitor.prometheus import ServingMetrics
from lexmill.monitor.trackers import Tracker, open_trackers

__all__ = [
    "Event",
    "Fanout",
    "JsonlSink",
    "ProgressSink",
    "ServingMetrics",
    "Sink",
    "Tracker",
    "open_trackers",
    "read_events",
]
