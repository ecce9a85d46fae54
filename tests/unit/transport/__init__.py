"""Units of `sidecar.transport` that need no network."""
