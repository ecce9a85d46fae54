"""Everything that the sidecar tells those who watch, held against what it promises to tell."""
