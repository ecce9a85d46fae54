"""Mirrors `sidecar/config/`."""
