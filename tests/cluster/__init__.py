"""The injector on a real API server, registered as its manifests register it."""
