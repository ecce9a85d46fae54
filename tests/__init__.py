"""The tests: unit (no I/O), contract (real OPA), e2e (processes), and what they share."""
