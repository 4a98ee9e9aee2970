"""Lexmill: from text to a small, fast, monitored language service on the hardware people own."""
