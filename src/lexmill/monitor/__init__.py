"""What happens while Lexmill works: events, the sinks they go to, and the metrics of a server."""

from lexmill.monitor.events import Event, Fanout, JsonlSink, Sink, read_events
from lexmill.monitor.progress import ProgressSink
from lexmill.monitor.prometheus import ServingMetrics

__all__ = ["Event", "Fanout", "JsonlSink", "ProgressSink", "ServingMetrics", "Sink", "read_events"]
