"""GRU (Cho et al. 2014): an LSTM with one state in place of two."""

from __future__ import annotations

from lexmill.models.families import lstm

FAMILY = lstm.FAMILY.variant(name="gru", fixed={"cell": "gru"})
