"""Tests of one module each, without I/O; the folder mirrors `sidecar/`."""
