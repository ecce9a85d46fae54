"""Mirrors `sidecar/opa/`."""
