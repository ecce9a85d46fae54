"""Bytes to meaning and back. No socket, clock, logger or vendor is imported here."""
