"""Meaning to decision and decision to outcome: values in, values out, nothing else."""
