"""Official clients on a tour of one server, with the sidecar between and without: all the same."""
