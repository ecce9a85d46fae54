"""Coverage-guided fuzzing of what reads bytes that somebody else has written.

`targets` says what must hold for any bytes, `seeds` what the search begins with, `worker` is the
process that one target runs in, and ``python -m tests.fuzz`` runs them side by side.
"""
