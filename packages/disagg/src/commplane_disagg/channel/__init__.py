"""The channel between ends: who is there, and small messages in order. What they mean is the ends' matter."""

from __future__ import annotations

from commplane_disagg.channel.channel import Channel, Down, Event, Said, Up, bind
from commplane_disagg.channel.messages import Identity
from commplane_disagg.channel.process import has_ended

__all__ = ["Channel", "Down", "Event", "Identity", "Said", "Up", "bind", "has_ended"]
